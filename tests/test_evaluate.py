"""Evaluation counts images; the plots can be looked at."""

import pytest
import torch
from torch import nn

from micronet.data import Data, ImageSet, digits, plain_loader
from micronet.evaluate import evaluate
from micronet.optim import CrossEntropy, TopK, top_k_hits
from micronet.report import flat, plot_confusion, write_csv


class Reads(nn.Module):
    """Answers the class that is written into an image's first pixel."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes, self.scale = classes, nn.Parameter(torch.ones(1))

    def forward(self, x):
        said = (x[:, 0, 0, 0] * 255).round().long()
        near = -(torch.arange(self.classes) - said[:, None]).abs().float()
        return near * self.scale


def written(labels: list[int], said: list[int]) -> Data:
    images = torch.zeros(len(labels), 8, 8, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(said, dtype=torch.uint8)
    images = images.permute(0, 3, 1, 2)
    split = ImageSet(images, torch.tensor(labels))
    names = tuple(f"class {i}" for i in range(10))
    parts = {"train": split, "valid": split, "test": split, "classes": names}
    return Data(
        name="written", mean=(0.0,) * 3, std=(1.0,) * 3, batch_size=2, augment=None, valid_is_test=False, **parts
    )


def test_counts_are_counts_whatever_the_batches():
    data = written([0, 1, 2, 3, 9, 9, 9], [0, 1, 2, 9, 9, 0, 7])
    result = evaluate(Reads(10), plain_loader(data.test, data))
    assert (result.images, result.top1_count) == (7, 4)
    assert result.top5_count == 5  # 7 for 9: 9 is among 7 and its four nearest; 9 for 3 and 0 for 9: no
    assert result.confusion[9, 0] == 1
    assert result.confusion[3, 9] == 1
    assert result.confusion.sum() == 7
    assert result.class_accuracy()[9].item() == pytest.approx(1 / 3)
    assert result.class_accuracy()[5].isnan()


def test_the_networks_mode_is_left_as_it_was():
    data = written([0, 1], [0, 1])
    network = Reads(10).train()
    evaluate(network, plain_loader(data.test, data))
    assert network.training


def test_top_k_counts_ties_of_few_classes():
    logits = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    assert top_k_hits(logits, torch.tensor([0, 0]), 1) == 1
    assert top_k_hits(logits, torch.tensor([0, 0]), 5) == 2
    metric = TopK(1)
    assert metric.name == "top1"
    assert metric.value is None


def test_label_smoothing_stays_out_of_validation():
    logits, labels = torch.randn(6, 4, requires_grad=True), torch.randint(0, 4, (6,))
    loss = CrossEntropy(0.1)
    plain = nn.functional.cross_entropy(logits, labels)
    assert not torch.isclose(loss(logits, labels), plain)
    with torch.no_grad():
        assert torch.equal(loss(logits, labels), plain)
    loss.reduction = "none"
    assert loss(logits, labels).shape == (6,)
    with pytest.raises(ValueError, match="label_smoothing"):
        CrossEntropy(1.0)


def test_confusion_plot_is_written(tmp_path):
    data = digits()
    torch.manual_seed(0)
    network = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))
    result = evaluate(network, plain_loader(data.valid, data))
    plot_confusion(result, data.classes, tmp_path / "c.png", "digits")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["c.png"]


def test_the_colour_bar_lies_below_its_matrix(tmp_path, monkeypatch):
    """Beside it, its label would stand where the bar chart's axis has its own."""
    from micronet import report

    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
    data = written([0, 1, 2], [0, 1, 1])
    plot_confusion(evaluate(Reads(10), plain_loader(data.test, data)), data.classes, tmp_path / "c.png", "written")
    figures[0].canvas.draw()
    matrix, _, bar = (ax.get_position() for ax in figures[0].axes)
    assert bar.y1 < matrix.y0


def test_rows_of_different_columns_make_one_table(tmp_path):
    write_csv([flat({"a": 1, "v": {"x": 2}}), {"b": 3}], tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == "a,v_x,b\n1,2,\n,,3\n"
