"""`micronet bench`: real files in processes of their own; turns, memory, and what happens when a process goes wrong."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from test_pack import bundled, masked, quantised

import micronet.bench as module
import micronet.bench_process
import micronet.bench_worker
from micronet import machine
from micronet.bench import bench
from micronet.bench_cost import Cost, cost_of
from micronet.bench_layers import Layers
from micronet.bench_process import Process, pick_cores
from micronet.bench_report import zeros
from micronet.bench_results import Options
from micronet.bench_runtimes import OnnxModel, peak_memory
from micronet.bench_worker import Waits, Worker
from micronet.errors import MicronetError
from micronet.model_source import of_bundle, open_model
from micronet.models import separable_net
from micronet.pack import pack

COMMITTED = Path(__file__).parent / "data" / "resnet20_cifar10.pth"
LINUX = Path("/proc/self/status").exists()
QUICK = Options(seconds=0.2, batch=8, limit=60)


def write_net(path, width, zeros=0.0, batch="n", size=16):
    """Write three convolutions of a width and a linear layer, with a share of zeros in every weight."""
    rng = np.random.default_rng(0)

    def array(name, *shape):
        values = rng.standard_normal(shape).astype(np.float32) / float(np.prod(shape[1:])) ** 0.5
        values[rng.random(shape) < zeros] = 0
        return numpy_helper.from_array(values, name)

    nodes, arrays, last = [], [], "x"
    for i, channels in enumerate((3, width, width)):
        arrays.append(array(f"block.{i}.weight", width, channels, 3, 3))
        nodes.append(helper.make_node("Conv", [last, f"block.{i}.weight"], [f"c{i}"], f"conv{i}", pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"], f"relu{i}"))
        last = f"r{i}"
    arrays.append(array("fc.weight", 10, width))
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["p"], "pool"))
    nodes.append(helper.make_node("Flatten", ["p"], ["f"], "flatten"))
    nodes.append(helper.make_node("Gemm", ["f", "fc.weight"], ["y"], "fc", transB=1))
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, size, size])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 10])
    graph = helper.make_graph(nodes, "net", [given], [result], arrays)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    write_net(folder / "dense.onnx", 32)
    write_net(folder / "sparse.onnx", 32, zeros=0.9)
    write_net(folder / "wide.onnx", 64)
    write_net(folder / "one.onnx", 32, batch=1)
    return folder


def job(path, **more):
    given = {"model": str(path), "runtime": "onnxruntime", "threads": 1, "cores": [], "device": "cpu"}
    return given | {"input_size": None, "factory": None, "limit": 60} | more


@pytest.fixture(scope="module")
def measured(files):
    """Networks of the same, of as many, and of four times as many multiply-accumulates."""
    names = [str(files / f"{name}.onnx") for name in ("dense", "sparse", "wide")]
    return bench(names, Options(seconds=1.0, batch=16, per_layer=True))


def test_a_network_of_four_times_the_macs_is_slower(measured):
    dense, sparse, wide = measured.models
    assert wide.cost.macs > 3 * dense.cost.macs
    for ratio in (wide.latency.ratio, wide.throughput.ratio):
        assert 0.05 < ratio.value < 0.8
        assert ratio.high < 1
    assert "slower" in wide.verdict
    assert wide.predicted == pytest.approx(dense.cost.ops / wide.cost.ops)
    assert dense.latency.ratio is None
    assert dense.verdict == ""
    assert 0.8 < sparse.latency.ratio.value < 1.25


def test_zeros_are_no_gain(measured):
    _, sparse, _ = measured.models
    assert sparse.cost.zeros == pytest.approx(0.9, abs=0.02)
    assert sparse.predicted > 2
    assert "90 % zeros" in sparse.verdict
    assert "no gain on this runtime" in sparse.verdict or "computed like any other number" in sparse.verdict


def test_what_is_told_of_each_model(measured, files):
    dense = measured.models[0]
    assert dense.cost.file_bytes == (files / "dense.onnx").stat().st_size
    assert dense.cost.params == 32 * 27 + 2 * 32 * 32 * 9 + 320
    assert dense.latency.spread.median <= dense.latency.spread.p95
    assert len(dense.latency.rounds) >= 8
    assert dense.throughput.images_per_second > 1 / dense.latency.spread.median / 4
    assert sum("Conv" in node["op"] for node in dense.layers) == 3
    assert sum(node["share"] for node in dense.layers) == pytest.approx(1)
    assert {node["layer"] for node in dense.layers} == {"block.0", "block.1", "block.2", "fc", ""}
    assert all(node["layer"].startswith("block.") for node in dense.layers if "Conv" in node["op"])
    assert sum(node["seconds"] for node in dense.layers) < 20 * dense.latency.spread.median


def test_memory_is_that_of_a_fresh_process_without_torch(measured):
    """This process holds torch and more: `ru_maxrss` of a child would tell of that."""
    held = np.ones(300 << 20, np.uint8)
    assert peak_memory() > held.nbytes
    for model in measured.models:
        assert 0 < model.memory["before"] < model.memory["peak"] < 200 << 20


@pytest.mark.skipif(not LINUX, reason="looks into /proc")
def test_a_large_parent_is_not_measured_and_onnx_needs_no_torch(files):
    held = np.ones(300 << 20, np.uint8)
    with Process("dense", job(files / "dense.onnx")) as process:
        assert process.answer()["memory"]["peak"] < held.nbytes
        assert "torch" not in Path(f"/proc/{process.process.pid}/maps").read_text()
        assert process.ask(do="prepare", batch=2)["seconds"] > 0


def test_json_holds_it_all(measured):
    told = json.loads(json.dumps(measured.to_json()))
    assert (told["format"], told["version"]) == ("micronet bench", 1)
    assert told["machine"]["hardware"]["cpu"]
    assert told["machine"]["hardware"]["threads"] == 1
    assert "onnxruntime" in told["machine"]["versions"]
    dense, _, wide = told["models"]
    assert wide["latency"]["ratio"]["low"] <= wide["latency"]["ratio"]["value"] <= wide["latency"]["ratio"]["high"]
    assert dense["throughput"]["images_per_second"] == pytest.approx(16 / dense["throughput"]["spread"]["median"])
    assert told["options"]["seed"] == 0


def test_the_command_prints_tables_and_sentences_draws_and_writes(files, call, tmp_path):
    one, dense = str(files / "one.onnx"), str(files / "dense.onnx")
    arguments = ["--seconds", "0.1", "--batch", "4", "-o", tmp_path / "b.png", "--json", tmp_path / "b.json"]
    status, out, err = call("bench", dense, one, *arguments, "--per-layer")
    assert status == 0, err
    for part in ("dense.onnx", "speed-up", "predicted", "peak memory", "one.onnx against dense.onnx: ", "seed 0"):
        assert part in out
    assert "one.onnx: takes 1 image at a time: no throughput at 4" in out
    # What it means comes first, then the nodes, and below the last table what a node is.
    parts = ["one.onnx against dense.onnx: ", " slowest of ", "block.2", "nodes: as onnxruntime runs them"]
    places = [out.index(part) for part in parts]
    assert places == sorted(places)
    assert out.count("nodes: as onnxruntime runs them") == 1
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((tmp_path / "b.json").read_text())
    assert told["models"][1]["throughput"] is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b.json", "b.png"]


@pytest.mark.parametrize("fails", ["--json", "-o"])
def test_what_was_measured_is_printed_where_it_cannot_be_written(fails, files, call, tmp_path, monkeypatch):
    import micronet.report

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[-1]))

    monkeypatch.setattr(micronet.report, "write_text" if fails == "--json" else "save_figure", full)
    monkeypatch.setattr("micronet.bench_report.save_figure", micronet.report.save_figure)
    given = ["--seconds", "0.05", "--batch", "1", "-o", tmp_path / "b.png", "--json", tmp_path / "b.json"]
    status, out, err = call("bench", files / "dense.onnx", *given)
    assert status == 1
    assert err.splitlines()[
        -1
    ] == f"micronet: {tmp_path / ('b.json' if fails == '--json' else 'b.png')}: " + os.strerror(errno.ENOSPC)
    assert "on paper and in memory" in out
    assert "ms, 1 image" in out
    assert (tmp_path / "b.json").exists() == (fails == "-o")


@pytest.mark.parametrize("outputs", [("-o", "none/b.png"), ("--json", "none/b.json"), ("--json", ".")])
def test_outputs_are_looked_at_before_anything_is_measured(outputs, files, call, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(module, "bench", None)
    status, out, err = call("bench", "dense.onnx", *outputs)
    assert (status, out, err.count("\n")) == (1, "", 1)


def test_zeros_of_masks_are_told_from_those_of_rounding(files, tmp_path):
    make = partial(bundled, separable_net, num_classes=3, width_multiplier=0.125)
    codes, both = quantised(make(), 3), quantised(masked(make(), 0.5), 3)
    share = sum(int((~mask).sum()) for mask in both.masks.values())
    numbers = sum(mask.numel() for mask in both.masks.values())
    rounded, held = (cost_of(of_bundle(bundle, "a")) for bundle in (codes, both))
    assert rounded.masked == 0
    assert 0.05 < rounded.zeros < 0.6
    assert zeros(rounded) == f"{100 * rounded.zeros:.0f} % rounded"
    assert held.zeros == held.masked == pytest.approx(share / numbers)  # of what a mask keeps, none is counted
    assert zeros(held) == f"{100 * share / numbers:.0f} % masked"
    assert zeros(replace(held, masked=0.3)) == "30 % masked, 20 % rounded"  # where one layer of two has a mask
    assert zeros(replace(rounded, zeros=0.0)) == "0 %"
    assert zeros(replace(rounded, weight_bits=32, zeros=0.2)) == "20 % not masked"
    # An ONNX file has no masks: nobody can tell.
    sparse = cost_of(open_model(str(files / "sparse.onnx")))
    assert sparse.masked is None
    assert zeros(sparse) == "90 %"
    assert zeros(replace(sparse, weight_bits=4)) == "90 % of codes"
    assert zeros(Cost(file_bytes=1, unknown="an operation without a rule")) == "-"


class Noise(CalibrationDataReader):
    """Two images to find ranges on."""

    def __init__(self):
        self.left = [{"x": np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)}]

    def get_next(self):
        return self.left.pop() if self.left else None


@pytest.mark.parametrize("codes", [False, True])
def test_nodes_lead_to_layers_whatever_is_fused_and_though_the_file_names_none(codes, files, tmp_path):
    path = tmp_path / "net.onnx"
    if codes:
        quantize_static(files / "dense.onnx", path, Noise(), activation_type=QuantType.QUInt8, per_channel=True)
    model = onnx.load(path if codes else files / "dense.onnx")
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, path)
    before = path.read_bytes()
    nodes = OnnxModel(job(path)).layers()
    heavy = {node["layer"]: node["op"] for node in nodes if "Conv" in node["op"] or "Gemm" in node["op"]}
    assert set(heavy) == {"block.0", "block.1", "block.2", "fc"}
    assert ("QLinearConv" in heavy.values()) == codes
    assert path.read_bytes() == before


def test_a_pooling_is_not_booked_to_the_layer_before_it(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (32, 3, 3, 3), "b.weight": (32, 32, 3, 3)}
    arrays = [numpy_helper.from_array(rng.standard_normal(shape).astype("f"), name) for name, shape in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["x", "a.weight"], ["c"], "conv0", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], "relu0"),
        helper.make_node("MaxPool", ["r"], ["m"], "max", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Constant", [], ["low"], "zero", value=numpy_helper.from_array(np.float32(0))),
        helper.make_node("Conv", ["m", "b.weight"], ["d"], "conv1", pads=[1] * 4),
        helper.make_node("Clip", ["d", "low"], ["s"], "clip1"),
        helper.make_node("AveragePool", ["s"], ["y"], "average", kernel_shape=[2, 2], strides=[2, 2]),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32, 4, 4])
    graph = helper.make_graph(nodes, "net", [given], [result], arrays)
    path = tmp_path / "pools.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    layers = Layers(graph)
    assert [layers(f"{name}_nchwc") for name in ("r", "m", "s", "y")] == ["a", "", "b", ""]
    found = [(node["layer"], node["op"]) for node in OnnxModel(job(path)).layers()]
    assert {layer for layer, op in found if "Pool" in op} == {""}
    assert sorted(layer for layer, op in found if "Conv" in op) == ["a", "b"]


def test_a_file_that_keeps_its_arrays_in_another_is_left_as_it_is(files, tmp_path):
    model = onnx.load(files / "dense.onnx")
    model.graph.node[0].name = ""
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    nodes = OnnxModel(job(tmp_path / "net.onnx")).layers()
    assert {"block.1", "block.2", "fc"} <= {node["layer"] for node in nodes}


class Machine:
    """A made-up machine, on which each model takes what it takes, and all becomes ten times as slow over time."""

    def __init__(self, seconds, changes=9.0):
        self.seconds, self.changes, self.turns = seconds, changes, []

    def process(self, name, job):
        outer = self

        class Fake:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                pass

            def answer(self):
                memory = {"before": 1, "peak": 2}
                return {"runtime": "onnxruntime", "version": "1", "input": [3, 16, 16], "most": None, "memory": memory}

            def ask(self, do, **order):
                if do == "prepare":
                    self.batch = order["batch"]
                    return {"seconds": 0.001, "layout": "channels first"}
                outer.turns.append((name, self.batch))
                slow = 1 + outer.changes * len(outer.turns) / 100
                return {"times": [outer.seconds[name] * slow] * 3, "waited": 0.3, "elapsed": 1.0}

        return Fake()


def test_turns_are_interleaved_and_drift_divides_out(files, monkeypatch):
    a, b = (str(files / f"{name}.onnx") for name in ("dense", "one"))
    machine = Machine({a: 2e-3, b: 1e-3})
    monkeypatch.setattr(module, "Process", machine.process)
    found = bench([a, b], Options(seconds=0.1, batch=4, seed=5))
    rounds = [machine.turns[i : i + 2] for i in range(0, len(machine.turns), 2)]
    assert all(Counter(name for name, _ in turn) == {a: 1, b: 1} for turn in rounds)
    firsts = Counter(turn[0][0] for turn in rounds)
    assert min(firsts[a], firsts[b]) >= len(rounds) / 5  # drawn anew, not always the same first
    ratio = found.models[1].latency.ratio
    assert ratio.low <= 2.05
    assert ratio.high >= 1.95
    assert ratio.value == pytest.approx(2, rel=0.05)
    # What unpaired times would say: the machine's own change hides the difference.
    times = found.models[0].latency
    assert max(times.rounds) / min(times.rounds) > 2
    assert found.waited == pytest.approx(0.3)
    assert any("others held the core for 30 %" in warning for warning in found.warnings)


@pytest.mark.parametrize(("threads", "seconds"), [(1, 0.006), (2, 0.01)])
def test_time_in_which_others_hold_the_core_is_not_the_models(threads, seconds, files, monkeypatch):
    class Clock:
        """Each run takes 10 ms, in 4 of which others hold the core."""

        file, now, stood = 3, 0.0, 0.0

        def __call__(self):
            return self.stood

        def run(self):
            self.now += 0.01
            self.stood += 0.004

    worker, clock = Worker(job(files / "dense.onnx", threads=threads)), Clock()
    worker.run, worker.waits = clock.run, clock
    monkeypatch.setattr(micronet.bench_worker, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    told = worker.time(0.2)
    assert told["times"] == pytest.approx([seconds] * len(told["times"]))
    assert told["waited"] / told["elapsed"] == pytest.approx(0.4)


def test_the_kernel_tells_how_long_one_waited():
    waits = Waits()
    if waits.file is None:
        pytest.skip("this system does not tell")
    first = waits()
    assert 0 <= first <= waits()
    os.close(waits.file)


def test_a_process_that_is_killed_or_hangs_is_one_line(files, monkeypatch):
    with Process("x.onnx", job(files / "dense.onnx", limit=2)) as process:
        process.answer()
        process.ask(do="prepare", batch=1)
        with pytest.raises(MicronetError, match=r"^x\.onnx: its process did not answer within 2 s, and was ended$"):
            process.ask(do="time", seconds=60)  # ended by its own alarm
    with Process("x.onnx", job(files / "dense.onnx")) as process:
        process.answer()
        os.kill(process.process.pid, signal.SIGKILL)
        with pytest.raises(MicronetError, match=r"^x\.onnx: its process was killed: out of memory, or by somebody$"):
            process.ask(do="prepare", batch=1)
    monkeypatch.setattr(micronet.bench_process, "GRACE", 0.0)
    with Process("x.onnx", job(files / "dense.onnx")) as process:
        process.answer()
        process.limit = 0.2
        os.kill(process.process.pid, signal.SIGSTOP)  # what no alarm wakes
        with pytest.raises(MicronetError, match="did not answer within"):
            process.ask(do="prepare", batch=1)
    assert process.process.returncode == -signal.SIGKILL


def test_a_crash_is_one_line(files):
    with Process("x.onnx", job(files / "dense.onnx")) as process:
        process.answer()
        os.kill(process.process.pid, signal.SIGSEGV)
        with pytest.raises(MicronetError, match=r"^x\.onnx: its process crashed \(SIGSEGV\); is the file sound\?$"):
            process.answer()


def test_ctrl_c_leaves_no_process_and_no_file(files, call, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started, asked = [], []

    class Watched(Process):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.append(self.process)

        def ask(self, **order):
            asked.append(order)
            if len(asked) == 5:
                raise KeyboardInterrupt
            return super().ask(**order)

    monkeypatch.setattr(module, "Process", Watched)
    models = [str(files / f"{name}.onnx") for name in ("dense", "wide")]
    status, _, err = call("bench", *models, "--seconds", "0.1", "-o", tmp_path / "b.png", "--json", tmp_path / "b.json")
    assert status == 130
    assert "interrupted" in err
    assert len(started) == 2
    assert all(process.returncode == -signal.SIGKILL for process in started)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing.onnx"], "nothing.onnx"),
        (["README"], "README"),
        (["dense.onnx", "--threads", "4096"], "--threads 4096: this process may use"),
        (["dense.onnx", "-o", "none/b.png"], "none: no such folder to write b.png to"),
        (["dense.onnx", "--device", "cuda:99"], "--device cuda:99: not usable here"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, says, files, call, monkeypatch):
    monkeypatch.chdir(files)
    (files / "README").write_text("no model")
    status, out, err = call("bench", *arguments, "--seconds", "0.1")
    assert status == 1
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("micronet: ")
    assert says in last
    assert "Traceback" not in err


@pytest.mark.parametrize("how", [{"runtime": "onnxruntime"}, {"per_layer": True}])
def test_quantised_layers_are_not_exported_without_ranges(how, tmp_path):
    """They would run in float where the file that `micronet export` writes runs on integers."""
    pack(quantised(bundled(separable_net, num_classes=3, width_multiplier=0.125), 4), tmp_path / "q.safetensors")
    with pytest.raises(MicronetError, match=r"q\.safetensors: its layers are quantised: run `micronet export` first"):
        bench([str(tmp_path / "q.safetensors")], replace(QUICK, **how))


CPUINFO = {
    "flags\t\t: fpu avx2 avx_vnni": ["avx2", "avx_vnni"],
    "flags\t\t: fpu avx2 avx512f avx512_vnni amx_int8": ["avx2", "avx512f", "avx512_vnni", "amx_int8"],
    "flags\t\t: fpu avx2 avx512f": ["avx2", "avx512f"],
    "BogoMIPS\t: 50.00\nFeatures\t: fp asimd asimddp sve i8mm": ["asimd", "i8mm", "sve", "asimddp"],
    "Features\t: fp asimd crc32": ["asimd"],
    "": [],
}


@pytest.mark.parametrize("told", CPUINFO)
def test_instruction_sets_are_read_on_x86_and_on_arm(told, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{told}\n\nprocessor\t: 1\n")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.hardware("cpu")["instruction_sets"] == CPUINFO[told]
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    assert not machine.hardware("cpu")["instruction_sets"]


def test_files_that_bench_cannot_run_say_why(files, tmp_path):
    write_net(tmp_path / "eight.onnx", 8, batch=8)
    write_net(tmp_path / "open.onnx", 8, size="side")
    (tmp_path / "cut.onnx").write_bytes((files / "dense.onnx").read_bytes()[:5000])
    for name, says in (
        ("eight", "made for 8 images at a time"),
        ("open", "leaves the size of its images open; give --input-size"),
        ("cut", "not an ONNX file, or one cut short"),
    ):
        with pytest.raises(MicronetError, match=says):
            OnnxModel(job(tmp_path / f"{name}.onnx"))
    assert OnnxModel(job(tmp_path / "open.onnx", input_size=[3, 8, 8])).images(2).shape == (2, 3, 8, 8)
    with pytest.raises(MicronetError, match="takes images of 3x16x16, not 3x8x8"):
        OnnxModel(job(files / "dense.onnx", input_size=[3, 8, 8]))


def test_help_has_an_example(call):
    status, out, _ = call("bench", "--help")
    assert status == 0
    assert "Example: micronet bench " in " ".join(out.split())
    assert "<bool>" not in out


def test_usage(files, call):
    for arguments in (["--runtime", "tvm"], ["--input-size", "3x8x8,3"], ["--seconds", "0"], ["--batch", "0"]):
        assert call("bench", files / "dense.onnx", *arguments)[0] == 2


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system can't pin")
def test_cores_are_the_idlest_one_of_each_physical_core(monkeypatch):
    taken = {0: 0, 1: 4, 2: 0, 3: 1, 4: 0, 5: 5}
    pairs = {core: f"{core % 3},{core % 3 + 3}" for core in taken}  # 0 and 3, 1 and 4, 2 and 5 are one each
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(taken))
    monkeypatch.setattr(micronet.bench_process, "_taken", lambda: taken)
    monkeypatch.setattr(micronet.bench_process, "_siblings", pairs.get)
    assert [pick_cores(n) for n in (1, 2, 3, 4)] == [[4], [2, 4], [0, 2, 4], [0, 2, 3, 4]]
    assert pick_cores(5) == []  # others hold the rest: pinned beside them it would wait
    with pytest.raises(MicronetError, match="--threads 7: this process may use 6 cores"):
        pick_cores(7)
    monkeypatch.setattr(micronet.bench_process, "_taken", dict)  # a system that does not tell
    assert pick_cores(2) == [4, 5]


@pytest.mark.slow
def test_a_checkpoint_beside_its_packed_file(call, tmp_path):
    """The same network in torch from two files: one process imports torch for each, 8 s."""
    from micronet.bundle import load
    from micronet.pack import pack

    pack(load(COMMITTED), tmp_path / "packed.safetensors")
    given = ["--seconds", "0.2", "--batch", "2", "--json", "-"]
    status, out, err = call("bench", COMMITTED, tmp_path / "packed.safetensors", *given)
    assert status == 0, err
    pth, packed = json.loads(out)["models"]
    assert {pth["runtime"], packed["runtime"]} == {"torch"}
    assert pth["cost"]["macs"] == packed["cost"]["macs"]
    assert pth["cost"]["file_bytes"] == 588_223
    assert packed["latency"]["layout"] in ("channels first", "channels last")
    assert packed["latency"]["ratio"]["value"] > 0.8  # BatchNorm is folded in it
    assert pth["memory"]["peak"] > pth["memory"]["before"] > 50 << 20


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_command_ends_its_processes(end, files, tmp_path):
    command = [sys.executable, "-m", "micronet", "bench", str(files / "dense.onnx"), str(files / "wide.onnx")]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    parent = subprocess.Popen(
        [*command, "--seconds", "60", "--json", str(tmp_path / "b.json")], stderr=subprocess.PIPE, text=True, env=env
    )
    with parent:
        line = ""
        while "rounds of 1 image" not in line:
            line = parent.stderr.readline()
            assert line
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.send_signal(end)
        parent.wait(30)
        assert parent.returncode == (-end if end == signal.SIGKILL else 130)
    assert len(children) == 2
    until = time.monotonic() + 30
    while any(is_running(child) for child in children):
        assert time.monotonic() < until
        time.sleep(0.1)
    if end != signal.SIGKILL:
        assert not [*tmp_path.glob("micronet-*"), *tmp_path.glob("*b.json")]


def is_running(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_all_on_one_runtime(files, call, tmp_path):
    given = ["--runtime", "onnxruntime", "--per-layer", "--seconds", "0.5", "--json", tmp_path / "b.json"]
    status, _, err = call("bench", COMMITTED, "micronet:separable_net,num_classes=10", *given)
    assert status == 0, err
    resnet, separable = json.loads((tmp_path / "b.json").read_text())["models"]
    assert {resnet["runtime"], separable["runtime"]} == {"onnxruntime"}
    assert resnet["notes"] == ["exported to a temporary ONNX file, which is what was timed"]
    assert separable["cost"]["file_bytes"] is None
    assert len(resnet["layers"]) > 20
    assert "torch" not in separable["verdict"]
    # 40.8 against 1.9 million MACs: depthwise layers keep little of that.
    assert separable["latency"]["ratio"]["low"] > 1.5


@pytest.mark.slow
def test_two_runtimes_are_said_to_be_two(files, call):
    status, out, err = call("bench", COMMITTED, files / "dense.onnx", "--seconds", "0.5", "--per-layer")
    assert status == 0, err
    assert "onnxruntime on cpu against torch on cpu: this compares the runtimes, too" in out
    assert "its layers are those of a temporary ONNX file in onnxruntime, not of torch" in out
    assert "BatchNorm is not folded unless it is in the file" in out
