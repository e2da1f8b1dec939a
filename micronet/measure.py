"""Accuracy of whatever a model comes as, on a split of a data set, after checking that the two belong together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, cat, from_numpy, get_num_threads, nn, no_grad, zeros

from micronet.errors import MicronetError
from micronet.evaluate import Evaluation, evaluate
from micronet.onnx_session import cannot_run, open_session

if TYPE_CHECKING:
    from micronet.data import Data
    from micronet.model_source import ModelSource


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An evaluation and what it was made on.

    Args:
        result: The counts.
        data: The image sets, with the mean and deviation that were used.
        device: Where it was computed.
    """

    result: Evaluation
    data: "Data"
    device: Any


class OnnxModule(nn.Module):
    """An ONNX file as a module, computed by onnxruntime on the CPU, with as many threads as torch uses.

    Args:
        path: The file; one input of images, logits as its first output.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = get_num_threads()
        self.session = open_session(path, options)
        first = self.session.get_inputs()[0]
        images = first.shape[0] if first.shape else None
        self.input, self.batch = first.name, images if isinstance(images, int) and images > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images (B, C, H, W); one by one where the file knows one image only."""
        parts = x.cpu().split(self.batch or len(x))
        try:
            return self.answer(parts)
        except Exception as error:  # onnxruntime's own errors share no class
            raise cannot_run(self.path, error) from error

    def answer(self, parts: Sequence[Tensor]) -> Tensor:
        """The logits of some batches, one after another."""
        return cat([from_numpy(self.session.run(None, {self.input: part.numpy()})[0]) for part in parts])


def images_for(source: "ModelSource", data: str, **kwargs: Any) -> "Data":
    """Load the data set that a model is to be measured on, normalised as the model says.

    Args:
        source: The model.
        data: digits, cifar10, cifar100, or the path of an image folder.
        kwargs: How valid was cut from train, as `by_name` takes it.

    Raises:
        MicronetError: Sizes, channels or classes of the two differ.
    """
    from micronet.data import by_name

    size = source.input_size if source.path is None else source.graph().input_size
    images = by_name(data, size=size[1] if size else 32, **kwargs)
    if size and images.input_size != size:
        raise MicronetError(
            f"{source.name}: takes images of {'x'.join(map(str, size))} (channels, height, width), "
            f"those of {data} are {'x'.join(map(str, images.input_size))}"
        )
    if source.classes and images.classes != source.classes:
        raise MicronetError(
            f"{source.name}: its {len(source.classes)} classes ({', '.join(source.classes[:3])}, ...) are not the "
            f"{len(images.classes)} of {data} ({', '.join(images.classes[:3])}, ...)"
        )
    # What it was trained with; else the data set's own.
    return images if source.mean is None else replace(images, mean=source.mean, std=source.std)


def measure(source: "ModelSource", data: str, split: str, device: Any = None, **kwargs: Any) -> Measured:
    """Count what a model answers on a split.

    Args:
        source: The model.
        data: digits, cifar10, cifar100, or the path of an image folder.
        split: train, valid or test.
        device: Where to compute; None for a GPU where there is one.
        kwargs: How the split was cut, as `by_name` takes it.

    Raises:
        MicronetError: Sizes, channels or classes of the two differ, or there is no such split.
    """
    from micronet.data import plain_loader
    from micronet.learner import pick_device

    images = images_for(source, data, **kwargs)
    chosen = getattr(images, split)
    if chosen is None:
        raise MicronetError(f"{data} has no {split} split")
    module = source.module if source.module is not None else OnnxModule(source.path)
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise MicronetError(f"{source.name}: its weights are untrained: there is nothing to measure")
    device = pick_device(device if source.path is None else "cpu")
    with no_grad():
        shape = tuple(module.cpu().eval()(zeros(2, *images.input_size)).shape)
    if len(shape) != 2 or shape[0] != 2:
        raise MicronetError(f"{source.name}: gives {' x '.join(map(str, shape))} numbers for 2 images: no classifier")
    if shape[1] != len(images.classes):
        raise MicronetError(f"{source.name}: gives {shape[1]} logits, {data} has {len(images.classes)} classes")
    result = evaluate(module, plain_loader(chosen, images, device=device), device)
    return Measured(result=result, data=images, device=device)
