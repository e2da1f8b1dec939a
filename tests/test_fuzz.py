"""Any file, mutated or made on purpose, is read or refused in a line: no crash, no hang, no code run, nothing written.

All is read by `fuzz_worker.py`, a process of its own that is started anew when it dies: torch's reader of archives,
onnx's checker and shape inference, and onnxruntime are native code. What it may compute and the memory that it may take
for one file are limited there.
"""

import io
import json
import os
import select
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import damaged, damages, headed, repacked, spoil, spoil_graph, written
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import F, node, ones
from PIL import Image
from test_pack import bundled, masked, quantised

from micronet.bundle import save
from micronet.models import separable_net
from micronet.onnx_meta import Meta, write_meta
from micronet.pack import pack

WAIT = 400  # s: an answer that takes no computing time is none
ONNX = ("score", "meta", "evaluate", "predict", "checker")
SMALL = {"num_classes": 3, "width_multiplier": 0.125}


class Worker:
    """The process that reads."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process = folder, None
        self.image = folder / "image.png"
        Image.new("RGB", (9, 9)).save(self.image)
        (folder / "empty").mkdir()
        (folder / "cache").mkdir()

    def start(self) -> None:
        """Begin one, unless there is one."""
        if self.process is None:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PYTHONDONTWRITEBYTECODE": "1"}
            environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder / "cache")
            command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("fuzz_worker.py")), str(self.image)]
            self.process = subprocess.Popen(
                command, cwd=self.folder / "empty", env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert self.answer() == "ready", "it does not begin"

    def answer(self):
        """Its next line; None where it died."""
        ready, _, _ = select.select([self.process.stdout], [], [], WAIT)
        assert ready, "it hangs"
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def read(self, reader: str, path: Path) -> dict:
        """Have a file read; how that ended."""
        self.start()
        self.process.stdin.write(json.dumps([reader, str(path)]).encode() + b"\n")
        self.process.stdin.flush()
        found = self.answer()
        if found is None:
            found = {"outcome": "died", "told": f"status {self.end()}"}
        return found

    def end(self) -> int:
        """End it; gives its exit status."""
        process, self.process = self.process, None
        with process:
            process.stdin.close()
            return process.wait(60)

    def require(self, reader: str, path: Path) -> str | None:
        """Have a file read; the line that it is refused with, None where it is read. Anything else fails."""
        found = self.read(reader, path)
        assert found["outcome"] in ("answered", "refused"), (reader, found["outcome"], found["told"])
        assert not found["heard"], (reader, found["heard"])
        assert not list((self.folder / "empty").iterdir())
        if found["outcome"] == "answered":
            return None
        assert found["told"]
        assert "\n" not in found["told"], found["told"]
        assert not found["starved"] or reader in ("predict", "evaluate", "checker"), found["told"]
        return found["told"]


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """One for all tests."""
    made = Worker(tmp_path_factory.mktemp("worker"))
    yield made
    if made.process:
        assert made.end() == 0


def classifier(quantised: bool = False) -> bytes:
    """A network as exporters write it, with our description, in float32 or in int8."""
    random = np.random.default_rng(0)
    arrays = {
        "w": random.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "s": ones(4),
        "fc": random.standard_normal((3, 4)).astype(np.float32),
        "b": ones(3),
    }
    nodes = [
        node("Conv", "x w", "c", pads=[1, 1, 1, 1]),
        node("BatchNormalization", "c s s s s", "n"),
        node("Relu", "n", "r"),
        node("GlobalAveragePool", "r", "p"),
        node("Flatten", "p", "f"),
        node("Gemm", "f fc b", "y", transB=1),
    ]
    if quantised:
        arrays |= {"w": random.integers(-127, 127, (4, 3, 3, 3)).astype(np.int8), "ws": ones(4) / 99}
        arrays |= {"wz": np.zeros(4, np.int8), "xs": np.float32(0.1), "xz": np.uint8(128)}
        nodes[:1] = [
            node("QuantizeLinear", "x xs xz", "q"),
            node("DequantizeLinear", "q xs xz", "d"),
            node("DequantizeLinear", "w ws wz", "dw", axis=0),
            node("Conv", "d dw", "c", pads=[1, 1, 1, 1]),
        ]
    return model_of(nodes, described=True, gives=("N", 3), **arrays).SerializeToString()


def model_of(
    nodes, shape=("N", 3, 8, 8), described=False, functions=(), inputs=None, gives=tuple("nchw"), **arrays
) -> onnx.ModelProto:
    """A model from `x` to `y`; `arrays` are its constants."""
    given_ = [helper.make_tensor_value_info(name, F, size) for name, size in (inputs or {"x": shape}).items()]
    held = [a if isinstance(a, TensorProto) else numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()]
    graph = helper.make_graph(nodes, "made", given_, [helper.make_tensor_value_info("y", F, gives)], held)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)
    if described:
        about = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "normalised": False}
        write_meta(model, Meta(classes=("a", "b", "c"), input_size=(3, 8, 8), **about))
    return model


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Real files of each kind."""
    folder = tmp_path_factory.mktemp("seeds")
    sparse = replace(masked(bundled(separable_net, **SMALL), 0.6), history=[{"top1": 0.5}], provenance={"seed": 1})
    save(sparse, folder / "model.pth")
    save(sparse, folder / "minmax8.pth", dtype=torch.uint8)
    torch.save(sparse.model.state_dict(), folder / "state.pth")
    pack(sparse, folder / "sparse.safetensors")
    pack(quantised(masked(bundled(separable_net, **SMALL), 0.6), 4), folder / "coded.safetensors", coded=True)
    (folder / "float.onnx").write_bytes(classifier())
    (folder / "int8.onnx").write_bytes(classifier(quantised=True))
    curve = {"name": "conv1", "layers": ["conv1"], "channels": 8, "points": [{"ratio": 0.5, "top1_count": 90}]}
    told = {"format": "micronet sensitivity", "version": 1, "images": 100, "top1_count": 91, "curves": [curve]}
    (folder / "curves.json").write_text(json.dumps(told))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 17, 3), np.uint8).astype(np.uint8))
    for suffix in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm"):
        picture.save(folder / f"image.{suffix}")
    return folder


def reader_of(name: str) -> tuple[str, ...]:
    """What reads such a file."""
    kinds_ = {".onnx": ONNX, ".json": ("curves",), ".safetensors": ("bundle",), ".pth": ("bundle",)}
    return ("state",) if name == "state.pth" else kinds_.get(Path(name).suffix, ("image",))


FILES = ("model.pth", "minmax8.pth", "state.pth", "sparse.safetensors", "coded.safetensors", "float.onnx", "int8.onnx")
IMAGES = tuple(f"image.{suffix}" for suffix in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm"))
quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


def test_the_files_that_are_mutated_are_read(worker, seeds):
    for name in (*FILES, *IMAGES, "curves.json"):
        for reader in reader_of(name):
            assert worker.require(reader, seeds / name) is None, (name, reader)
    assert worker.read("bundle", seeds / "none.pth")["outcome"] == "refused"


def fuzzed(number: int):
    """A test's settings: so many examples, always the same."""
    return settings(max_examples=number, **quiet)


def bytes_of(worker, seeds, name, how) -> None:
    path = written(seeds / f"damaged{Path(name).suffix}", damaged((seeds / name).read_bytes(), how))
    for reader in reader_of(name):
        worker.require(reader, path)


def inside_of(worker, seeds, name, data) -> None:
    """What lies behind a checksum, damaged, with a checksum that is right."""
    content = (seeds / name).read_bytes()
    path = seeds / f"inside{Path(name).suffix}"
    if path.suffix == ".pth":
        how, other = data.draw(damages), data.draw(st.booleans())
        content = repacked(content, lambda part, value: damaged(value, how) if ("pkl" in part) != other else value)
    elif path.suffix == ".safetensors":

        def change(header, tensors):
            if data.draw(st.booleans()):
                spoil(data.draw, header)
            else:
                part = data.draw(st.sampled_from(sorted(tensors)))
                raw = np.frombuffer(damaged(tensors[part].tobytes(), data.draw(damages)), np.uint8)
                kind = tensors[part].dtype
                tensors[part] = raw[: raw.size // kind.itemsize * kind.itemsize].view(kind)

        content = headed(content, change)
    elif path.suffix == ".json":
        told = json.loads(content)
        spoil(data.draw, told)
        content = json.dumps(told).encode()
    else:
        content = spoil_graph(data.draw, content)
    written(path, content)
    for reader in reader_of(name):
        worker.require(reader, path)


@fuzzed(80)
@given(name=st.sampled_from((*FILES, *IMAGES, "curves.json")), how=damages)
def test_damaged_bytes(worker, seeds, name, how):
    bytes_of(worker, seeds, name, how)


@fuzzed(140)
@given(name=st.sampled_from((*FILES, "curves.json")), data=st.data())
def test_damage_behind_the_checksum(worker, seeds, name, data):
    inside_of(worker, seeds, name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FILES, *IMAGES, "curves.json"])
@settings(max_examples=300, **quiet | {"derandomize": False})
@given(how=damages)
def test_damaged_bytes_for_long(worker, seeds, name, how):
    bytes_of(worker, seeds, name, how)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FILES, "curves.json"])
@settings(max_examples=500, **quiet | {"derandomize": False})
@given(data=st.data())
def test_damage_behind_the_checksum_for_long(worker, seeds, name, data):
    inside_of(worker, seeds, name, data)


def archive(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive as `torch.save` makes it, of these parts."""
    made = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(made, "w", compression) as file:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in parts.items():
            file.writestr(zipfile.ZipInfo(f"model/{name.rstrip()}"), content, compression)
    return made.getvalue()


def parts_of(content: object) -> dict[str, bytes]:
    """What `torch.save` puts into an archive."""
    made = io.BytesIO()
    torch.save(content, made)
    with zipfile.ZipFile(made) as file:
        return {entry.partition("/")[2]: file.read(entry) for entry in file.namelist()}


class Payload:
    """Runs a command where it is unpickled with its code."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def doubled(times: int) -> list:
    """A list that is two of a list, so many times: 2 ** times places, and a few bytes."""
    found: list = [1]
    for _ in range(times):
        found = [found, found]
    return found


def nested(times: int) -> list:
    found: list = []
    for _ in range(times):
        found = [found]
    return found


def itself() -> list:
    found: list = []
    found.append(found)
    return found


def pickled(*commands: bytes) -> bytes:
    """An archive around a pickle that was written by hand."""
    return archive(parts_of({}) | {"data.pkl": b"\x80\x02" + b"".join(commands) + b"."})


def hostile_bundles(whole: dict, marker: Path):
    """Files that are no bundles, or bundles made to do harm: a word of the line that they are refused with."""
    parts = parts_of(whole)
    number = next(name for name in parts if name.startswith("data/"))
    weight = next(iter(whole["state"].values()))
    shared = torch.zeros(1000, 1000)
    command = f"touch {marker}"
    run = b"cposix\nsystem\nX" + len(command).to_bytes(4, "little") + command.encode() + b"\x85R"
    yield "compressed", archive(parts, zipfile.ZIP_DEFLATED), "packed otherwise"
    yield "a bomb", archive(parts | {number: bytes(50_000_000)}, zipfile.ZIP_DEFLATED), "packed otherwise"
    yield "lzma", archive(parts, zipfile.ZIP_LZMA), "packed otherwise"
    yield "one name twice", archive(parts | {f"{number} ": b"x"}), "packed otherwise"
    yield "many parts", archive(parts | {f"more/{i}": b"" for i in range(20_000)}), None
    yield "parts elsewhere", archive(parts | {"../../outside": b"x", "/outside": b"y"}), None
    yield "no parts", archive({}), "not one that PyTorch wrote"
    yield "a part is short", archive(parts | {number: parts[number][:-4]}), "damaged"
    yield "no such part", archive({name: part for name, part in parts.items() if name != number}), "damaged"
    for place in ("state", "provenance", "history", "kwargs", "masks", "format"):
        yield f"code in {place}", torch_bytes(whole | {place: Payload(command)}), "pickled objects"
    yield "code by hand", pickled(run), "pickled objects"
    yield "code by hand, later", pickled(b"}X\x06\x00\x00\x00format", run, b"s"), "pickled objects"
    yield "code as state", pickled(b"}", run, b"b"), "pickled objects"
    yield "builtins", pickled(b"cbuiltins\neval\nX\x03\x00\x00\x001/0\x85R"), "pickled objects"
    yield (
        "terabytes by a call",
        pickled(b"cbuiltins\nbytearray\n\x8a\x06", (10**13).to_bytes(6, "little"), b"\x85R"),
        "",
    )
    yield "a memo of gigabytes", pickled(b"}r\xff\xff\xff\x7f"), "not a bundle"
    yield "nothing on the stack", pickled(b"R"), "damaged"
    yield "doubled arguments", torch_bytes(whole | {"kwargs": {"x": doubled(60)}}), "hold themselves, or more"
    yield "doubled history", torch_bytes(whole | {"history": [{"x": doubled(60)}]}), "hold themselves, or more"
    yield "holds itself", torch_bytes(whole | {"provenance": {"x": itself()}}), "hold themselves, or more"
    yield "a future", torch_bytes(whole | {"version": 3}), "update micronet"
    yield (
        "one tensor everywhere",
        torch_bytes(whole | {"state": {str(i): shared for i in range(5000)}}),
        "fields are not",
    )
    yield "huge images", torch_bytes(whole | {"input_size": [3, 99_999, 99_999]}), "fields are not"
    first = next(name for name, value in whole["state"].items() if value.is_floating_point())
    strange = (weight.to_sparse(), torch.empty(0), weight.double(), weight.to("meta"), weight[:1].expand(9, -1, -1, -1))
    for other in strange:
        yield f"a {other.dtype}", torch_bytes(whole | {"state": whole["state"] | {first: other}}), None
    holes = {first: torch.full_like(whole["state"][first], float("nan"))}
    yield "no numbers", torch_bytes(whole | {"state": whole["state"] | holes, "masks": {}}), None


def torch_bytes(content: object) -> bytes:
    made = io.BytesIO()
    torch.save(content, made)
    return made.getvalue()


def test_bundles_that_were_made_to_do_harm(worker, seeds, tmp_path):
    whole = torch.load(seeds / "model.pth", weights_only=True)
    marker = tmp_path / "marker"
    for what, content, says in hostile_bundles(whole, marker):
        for reader in ("bundle", "state"):
            told = worker.require(reader, written(tmp_path / "model.pth", content))
            if reader == "bundle" and says is not None:
                assert told is not None, what
                assert says in told, (what, told)
        assert not marker.exists(), what
    deep = pickled(b"]" * 100_000 + b"a" * 99_999)
    assert "not a bundle" in worker.require("bundle", written(tmp_path / "model.pth", deep))


def external(place: str, size: int = 4) -> TensorProto:
    """A weight that lies in a second file."""
    tensor = TensorProto(name="w", data_type=F, dims=(size,), data_location=TensorProto.EXTERNAL)
    for key, value in (("location", place), ("offset", "0"), ("length", str(4 * size))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def function(name: str, *calls: str, times: int = 1):
    """A function that calls others, one after another."""
    names = ["x", *(f"t{i}" for i in range(len(calls) * times - 1)), "y"]
    nodes = [
        helper.make_node(call, [names[i]], [names[i + 1]], domain="" if call == "Relu" else "own")
        for i, call in enumerate(calls * times)
    ]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["x"], ["y"], nodes, opsets)


def body(*nodes, given=(), gives=("o",)):
    """A graph within a graph."""
    values = [[helper.make_tensor_value_info(name, kind, ()) for name, kind in one] for one in (given, ())]
    outs = [helper.make_tensor_value_info(name, kind, None) for name, kind in gives]
    return helper.make_graph(list(nodes), "body", values[0], outs)


def loop(count: int):
    """A loop that goes on so often."""
    given_ = (("i", TensorProto.INT64), ("go", TensorProto.BOOL), ("v", F))
    inner = [node("Identity", "go", "more"), node("Relu", "v", "o")]
    return [
        node("Loop", "n go x", "y", body=body(*inner, given=given_, gives=(("more", TensorProto.BOOL), ("o", F))))
    ], {
        "n": np.int64(count),
        "go": np.bool_(True),
    }


def branches(depth: int):
    """Branches within branches."""
    found = node("Relu", "x", "o")
    for _ in range(depth):
        inner, other = (body(one, gives=(("o", F),)) for one in (found, node("Identity", "x", "o")))
        found = node("If", "yes", "o", then_branch=inner, else_branch=other)
    return found


def hostile_graphs():
    """Graphs that were made to do harm."""
    own = {"domain": "own"}
    call = helper.make_node("f", ["x"], ["y"], domain="own")
    huge = TensorProto(name="w", data_type=F, dims=(2**31, 2**31))
    far = (2**62, 3, 2**40, 2**40)
    yield "no nodes", model_of([])
    yield "an unknown operator", model_of([node("Magic", "x", domain="com.acme")])
    yield "of ONNX's own domain", model_of([node("Magic", "x")])
    yield "a ring", model_of([node("Relu", "b", "a"), node("Relu", "a", "b"), node("Add", "a x")])
    yield "of itself", model_of([node("Relu", "y")])
    yield "twice the same", model_of([node("Relu", "x"), node("Relu", "x")])
    yield "a function that calls itself", model_of([call], functions=[function("f", "f")])
    yield "two that call each other", model_of([call], functions=[function("f", "g"), function("g", "f")])
    tower = [function(f"f{i}", f"f{i - 1}", times=2) for i in range(1, 60)]
    named = helper.make_node("f59", ["x"], ["y"], **own)
    yield "2 ** 59 calls", model_of([named], functions=[function("f0", "Relu"), *tower])
    chain = [function(f"f{i}", f"f{i - 1}") for i in range(1, 5000)]
    named = helper.make_node("f4999", ["x"], ["y"], **own)
    yield "5,000 functions deep", model_of([named], functions=[function("f0", "Relu"), *chain])
    for place in ("/etc/passwd", "../../../../../../etc/passwd", "/dev/zero", "w\0.bin", "nowhere.bin", "."):
        yield f"weights in {place}", model_of([node("Add", "x w")], w=external(place))
    yield "a weight without its bytes", model_of([node("MatMul", "x w")], w=huge)
    yield "one in a constant", model_of([helper.make_node("Constant", [], ["w"], value=huge), node("MatMul", "x w")])
    yield "huge images", model_of([node("Relu", "x")], shape=far)
    yield "huge images, unknown shapes", model_of([node("NonZero", "x", "n"), node("Cast", "n", to=1)], shape=far)
    yield "less than no images", model_of([node("Relu", "x")], shape=(-1, -3, -8, -8))
    yield "no images", model_of([node("Constant", "", value_float=1.0)], inputs={"unused": ()})
    for op in ("ConstantOfShape", "Expand", "Tile"):
        given_ = "n" if op == "ConstantOfShape" else "x n"
        far_n = np.array([1, 2**20, 2**20, 2**20])
        yield f"{op} of terabytes", model_of([node(op, given_)], n=far_n)
        yield f"{op} of terabytes, summed", model_of([node(op, given_, "t"), node("ReduceSum", "t")], n=far_n)
        yield f"{op} of less than nothing", model_of([node(op, given_)], n=np.array([1, -5, -5, -5]))
    yield (
        "a range without end",
        model_of(
            [node("Range", "a b c", "t"), node("Cast", "t", to=1)], a=np.int64(0), b=np.int64(2**62), c=np.int64(1)
        ),
    )
    yield (
        "a step of nothing",
        model_of([node("Range", "a b c", "t"), node("Cast", "t", to=1)], a=np.int64(0), b=np.int64(9), c=np.int64(0)),
    )
    nodes = [node("Pad", "k p", "t"), node("ReduceSum", "t", "u", keepdims=0), node("Add", "x u")]
    yield "a small sum of a huge padding", model_of(nodes, k=ones(1), p=np.array([2**38, 2**38]))
    pool = node("AveragePool", "k", "t", kernel_shape=[1], pads=[2**33, 2**33], strides=[2**34])
    nodes = [pool, node("Add", "x t")]
    yield "a small pool of a huge padding", model_of(nodes, k=ones(1, 1, 1))
    nodes = [
        node("StringConcat", "s t", "u"),
        node("RegexFullMatch", "u", "v", pattern="(a*)*b"),
        node("Cast", "v", to=1),
    ]
    yield "a pattern that takes for ever", model_of(nodes, s=np.array(["a" * 40], object), t=np.array(["c"], object))
    made, constants = loop(2**62)
    yield "a loop without end", model_of(made, described=True, **constants)
    yield "branches in branches", model_of([branches(25), node("Relu", "o")], yes=np.bool_(True))
    yield "a list of tensors", model_of([node("SequenceConstruct", "x x")])
    yield "text", model_of([node("Cast", "x", to=TensorProto.STRING)])
    yield "numbers without end", model_of([node("Mul", "x w")], described=True, w=np.float32(np.inf))
    yield "a convolution without weights", model_of([node("Conv", "x w")], w=np.zeros((0, 3, 3, 3), np.float32))
    yield "a convolution in no steps", model_of([node("Conv", "x w", strides=[0, 0])], w=ones(4, 3, 3, 3))
    yield "in no groups", model_of([node("Conv", "x w", group=0)], w=ones(4, 3, 3, 3))
    yield "with a huge padding", model_of([node("Conv", "x w", pads=[2**40] * 4)], w=ones(4, 3, 3, 3))
    yield "text for a number", model_of([node("Conv", "x w", group="3", strides="ab")], w=ones(4, 3, 3, 3))


def test_graphs_that_were_made_to_do_harm(worker, tmp_path):
    failed = []
    for what, model in hostile_graphs():
        path = written(tmp_path / "model.onnx", model.SerializeToString())
        for reader in ONNX:
            if (what, reader) == ("a loop without end", "predict"):
                continue  # it takes a minute
            try:
                worker.require(reader, path)
            except AssertionError as error:
                failed.append(f"{what}: {error}")
    assert not failed, "\n".join(failed)


@pytest.mark.slow
def test_a_graph_that_goes_on_for_ever_is_left_after_a_minute(call, tmp_path):
    made, constants = loop(2**62)
    written(tmp_path / "loop.onnx", model_of(made, described=True, **constants).SerializeToString())
    Image.new("RGB", (9, 9)).save(tmp_path / "image.png")
    status, _, error = call("predict", tmp_path / "loop.onnx", tmp_path / "image.png")
    assert (status, error) == (1, f"micronet: {tmp_path / 'loop.onnx'}: gave no answer in 60 seconds\n")


def test_the_worker_sees_what_it_is_to_see(worker, tmp_path):
    """Death, a file written, a program run, another exception."""
    marker = tmp_path / "marker"
    for reader, content, seen in (
        ("!open(path, 'w').close()", b"", "heard"),
        (f"!os.system('touch {marker}')", b"", "heard"),
        ("!1 / 0", b"", "raised"),
        ("!bytearray(3 << 30)", b"", "raised"),
        ("!os.kill(os.getpid(), 11)", b"", "died"),
    ):
        found = worker.read(reader, written(tmp_path / "file", content))
        assert found["outcome"] == seen or found.get(seen), (reader, found)
