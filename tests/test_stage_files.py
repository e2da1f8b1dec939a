"""What a stage leaves beside its network: an ONNX file with numbers of its own, measured on the file."""

import copy
import io
import json
from functools import partial

import onnx
import pytest
from fastai.callback.core import Callback
from rich.console import Console

from callbacks.onnx_export import export_onnx
from callbacks.protocol import OnnxFile
from callbacks.quantize import QuantizeInt8
from micronet import Fit, MicronetError, Recipe, RunOptions, run, score
from micronet.data import digits, plain_loader
from micronet.evaluate import evaluate
from micronet.measure import OnnxModule
from micronet.models import separable_net
from micronet.onnx_meta import read_meta

NETWORK = partial(separable_net, width_multiplier=0.25)
LIMIT = RunOptions(limit=160)
FILE = "model_int8.onnx"


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    """A run that trains, then quantises; and what it said."""
    folder, out = tmp_path_factory.mktemp("int8") / "run", io.StringIO()
    cut = partial(QuantizeInt8, images=64, floor=20)
    stages = (Fit("train", epochs=2, lr=0.1), Fit("int8", epochs=0, cbs=(cut,)))
    run(Recipe(partial(digits, batch_size=32), NETWORK, stages), folder, LIMIT, console=Console(file=out, width=250))
    return folder, out.getvalue()


def test_a_stage_leaves_the_onnx_file_that_its_row_is_measured_on(int8):
    folder, _ = int8
    row = json.loads((folder / "2-int8" / "row.json").read_text())
    file, data = folder / "2-int8" / FILE, digits(batch_size=32).limit(160)
    assert row["onnx"]["file"] == FILE
    assert row["onnx"]["file_bytes"] == file.stat().st_size < row["file_bytes"]
    for split in ("valid", "test"):
        answers = evaluate(OnnxModule(file), plain_loader(getattr(data, split), data)).row()
        assert row["onnx"][split] == answers
    cost = score(file)
    assert (row["onnx"]["storage"], row["onnx"]["score"]) == (cost.storage, cost.score)
    assert any(array.bits == 8 for array in cost.ledger.arrays)
    assert row["score"] != row["onnx"]["score"]  # the network's own is that of its floats


def test_the_runs_folder_holds_the_last_stages_onnx_file_and_a_second_run_leaves_it(int8):
    folder, _ = int8
    assert (folder / FILE).read_bytes() == (folder / "2-int8" / FILE).read_bytes()
    assert not (folder / "1-train" / FILE).exists()
    meta = read_meta(folder / FILE)
    assert meta.classes == digits().classes
    assert meta.provenance["made"]["images"] == 64
    before = (folder / "2-int8" / FILE).stat().st_mtime_ns
    cut = partial(QuantizeInt8, images=64, floor=20)
    stages = (Fit("train", epochs=2, lr=0.1), Fit("int8", epochs=0, cbs=(cut,)))
    run(Recipe(partial(digits, batch_size=32), NETWORK, stages), folder, LIMIT)
    assert (folder / "2-int8" / FILE).stat().st_mtime_ns == before


def test_the_output_has_a_line_for_each_of_the_two(int8):
    _, said = int8
    lines = [line for line in said.splitlines() if line.startswith("stage int8")]
    assert [line.partition(": ")[0] for line in lines] == ["stage int8", "stage int8", f"stage int8, {FILE}"]
    assert "quantize_int8: int8 from 64 images of train" in said


class Leaves(Callback):
    """Leaves an ONNX file that is none."""

    @property
    def onnx(self) -> OnnxFile:
        return OnnxFile("broken.onnx", onnx.ModelProto().SerializeToString(), {})


def test_a_graph_that_is_not_sound_is_not_kept(tmp_path):
    recipe = Recipe(partial(digits, batch_size=32), NETWORK, (Fit("broken", epochs=0, cbs=(Leaves,)),))
    with pytest.raises(MicronetError, match=r"broken.onnx: .*; no file was kept"):
        run(recipe, tmp_path / "r", LIMIT)
    assert not [*(tmp_path / "r").rglob("*.onnx"), *(tmp_path / "r").rglob("row.json")]


class Turned(Callback):
    """Leaves a graph that names the least likely class."""

    floor = None

    @property
    def onnx(self) -> OnnxFile:
        turned = copy.deepcopy(self.learn.model).cpu().eval()
        turned.fc.weight.data.neg_()
        turned.fc.bias.data.neg_()
        return OnnxFile("turned.onnx", export_onnx(turned, (3, 32, 32)).SerializeToString(), {}, self.floor)


class Tolerated(Turned):
    """Says that it may lose much."""

    floor = 20


@pytest.mark.parametrize(
    ("cb", "says"),
    [
        (Turned, r"of the callback\); no file was kept"),
        (Tolerated, r"at least 80 % must agree \(floor of the callback\); no file was kept"),
    ],
)
def test_a_graph_that_answers_otherwise_is_not_kept_whatever_callback_made_it(cb, says, tmp_path):
    recipe = Recipe(partial(digits, batch_size=32), NETWORK, (Fit("turned", epochs=0, cbs=(cb,)),))
    with pytest.raises(MicronetError, match=rf"turned.onnx: .*{says}"):
        run(recipe, tmp_path / "r", LIMIT)
    assert not [*(tmp_path / "r").rglob("*.onnx"), *(tmp_path / "r").rglob("row.json")]


def test_two_graphs_of_one_fit_are_refused(tmp_path):
    recipe = Recipe(partial(digits, batch_size=32), NETWORK, (Fit("two", epochs=0, cbs=(Leaves, Leaves)),))
    with pytest.raises(MicronetError, match="two callbacks of one fit leave an ONNX file"):
        run(recipe, tmp_path / "r", LIMIT)
