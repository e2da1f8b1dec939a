"""Answers of a model for image files: class names and probabilities. An ONNX file is run without importing torch."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, Any

import numpy as np

from micronet.decode import Entry, decode
from micronet.errors import MicronetError, first_line

if TYPE_CHECKING:
    from micronet.model_source import ModelSource

MOST_SECONDS = 60  # for one image: a graph can say to go on for ever


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One class that a model gives for an image.

    Args:
        index: place of its logit.
        name: its name; its number where the model names none.
        probability: softmax of its logit, in [0, 1].
    """

    index: int
    name: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A model that answers images, whatever file it came from; `open_predictor` makes it.

    Args:
        name: of its file.
        side: height and width of the images that it takes, pixels.
        classes: class names in the order of the logits; empty where the file does not say.
        mean: what to subtract from each channel of an image scaled to [0, 1].
        std: what to divide each channel by after that.
        run: logits, `(1, classes)`, of one image, float32 `(1, 3, side, side)`.
    """

    name: str
    side: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    run: Callable[[np.ndarray], np.ndarray]

    def __call__(self, path: Path, top: int) -> list[Answer]:
        """The classes with the highest probabilities for an image file, highest first.

        Args:
            path: the image.
            top: how many; all where there are fewer.

        Raises:
            MicronetError: the file is no image that can be read, or the model does not give logits for it.
        """
        logits = np.asarray(self.run(self.prepared(path)), np.float64)
        if logits.ndim != 2 or len(logits) != 1 or not np.isfinite(logits).all() or not logits.size:
            raise MicronetError(f"{self.name}: gives no finite logits for {path}, but an array of {logits.shape}")
        if self.classes and len(self.classes) != logits.size:
            raise MicronetError(f"{self.name}: gives {logits.size} logits and names {len(self.classes)} classes")
        shares = np.exp(logits[0] - logits.max())
        shares /= shares.sum()
        best = np.argsort(-shares, kind="stable")[:top]
        names = self.classes or tuple(map(str, range(logits.size)))
        return [Answer(index=int(i), name=names[i], probability=float(shares[i])) for i in best]

    def prepared(self, path: Path) -> np.ndarray:
        """An image as the network takes it, float32 `(1, 3, side, side)`.

        Args:
            path: the image.
        """
        pixels = pixels_of(path, self.side).astype(np.float32) / 255
        with np.errstate(all="ignore"):  # what a file says can be beyond float32: no logits are finite then
            images = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(images.transpose(2, 0, 1)[None])


def pixels_of(path: Path, side: int) -> np.ndarray:
    """The pixels of an image file as training takes them from an image folder, uint8 `(side, side, 3)`.

    Args:
        path: the file.
        side: the short side is scaled to it, the long one cropped at its centre.

    Raises:
        MicronetError: no such file, or no image that can be read.
    """
    if not path.is_file():
        what = "is a folder; name the images in it" if path.is_dir() else "no such file"
        raise MicronetError(f"{path}: {what}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow about large pictures and odd palettes
        return decode(Entry("", "", str(path), path), side, exact=False)


def open_predictor(model: str, *, factory: Any = None) -> Predictor:
    """Open a model of any kind that `open_model` reads, for predictions.

    Args:
        model: the path of an ONNX file, or of another kind.
        factory: builds a bundle's network instead of the function that the file names.

    Raises:
        MicronetError: it can't be read, does not say how its images are normalised, or takes no square RGB images.
    """
    if model.lower().endswith(".onnx"):
        return _of_onnx(model)
    from micronet.model_source import open_model

    return _of_source(open_model(model, factory=factory))


def _of_onnx(name: str) -> Predictor:
    import onnxruntime

    from micronet.onnx_meta import parse_meta
    from micronet.onnx_session import cannot_run, open_session

    session = open_session(name)
    meta = parse_meta(session.get_modelmeta().custom_metadata_map, name)
    if meta is None:
        raise _unknown(name)
    given = session.get_inputs()[0].name

    def run(images: np.ndarray) -> np.ndarray:
        options = onnxruntime.RunOptions()
        alarm = Timer(MOST_SECONDS, setattr, (options, "terminate", True))
        alarm.start()
        try:
            return np.asarray(session.run(None, {given: images}, options)[0], np.float64)
        except Exception as error:  # onnxruntime's own errors share no class
            if options.terminate:
                raise MicronetError(f"{name}: gave no answer in {MOST_SECONDS} seconds") from error
            raise cannot_run(name, error) from error
        finally:
            alarm.cancel()

    shown = {"classes": meta.classes, "mean": meta.input_mean, "std": meta.input_std}
    return Predictor(name=name, side=_side(name, meta.input_size), run=run, **shown)


def _of_source(source: "ModelSource") -> Predictor:
    import torch

    if source.mean is None or source.std is None:
        raise _unknown(source.name)
    module = source.module.eval()

    @torch.no_grad()
    def run(images: np.ndarray) -> np.ndarray:
        try:
            return module(torch.from_numpy(images)).numpy()
        except Exception as error:  # a network's own code can fail in any way
            raise MicronetError(f"{source.name}: its network can't answer: {first_line(error)[:200]}") from error

    shown = {"classes": source.classes, "mean": source.mean, "std": source.std}
    return Predictor(name=source.name, side=_side(source.name, source.input_size), run=run, **shown)


def _unknown(name: str) -> MicronetError:
    return MicronetError(
        f"{name}: does not say how large its images are and how they are normalised; "
        "give a model.pth, or an ONNX file of `micronet export`"
    )


def _side(name: str, size: tuple[Any, ...]) -> int:
    if len(size) != 3 or size[0] != 3 or size[1] != size[2]:
        raise MicronetError(f"{name}: takes {'x'.join(map(str, size))}, and predict gives square RGB images")
    return size[1]
