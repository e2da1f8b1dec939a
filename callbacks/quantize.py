"""Static int8 quantisation after training: an ONNX graph that onnxruntime computes with integers.

What: the network is folded and exported, the range of each tensor is found on some images, and onnxruntime's quantiser
    writes the int8 graph: weights as codes from -127 to 127 with a scale for each output, tensors as codes from 0 to
    255, the logits as float. The network itself stays as it is. Calibration looks at training images as they are,
    without augmentation, or at validation images; the test images it never sees.
When: as the last step. On CIFAR-10, a ResNet-20 is right on 9,027 of 10,000 test images after, on 9,038 before; 0.30 MB
    against 1.09. Other draws of the images and other methods gave up to 9,048. In training with ReLU6 instead of ReLU
    int8 costs 2 images instead of 12. One image, onnxruntime, one thread of a CPU with AVX512-VNNI, ms
    of CPU time, float and int8: ResNet-20 0.80 and 0.36, ResNet-18 12.4 and 3.2, the separable network 0.075 and 0.090:
    depthwise layers of 0.2 M weights gain nothing.
    A BatchNorm that can't fold (WRN, DenseNet, pre-activation ResNets) stays in float with the stream of sums or
    concatenations that it reads. Signal-to-noise ratio of the logits and agreement on some hundreds of images, of
    networks that were trained briefly; how many times faster than float:
                                      WRN-16-2    DenseNet-121/8  PreActResNet-18   WRN-22-6 DenseNet-121 PreAct
      stream and BatchNorm in float   36.7 98.2 %   35.3 98.2 %     31.3 99.0 %       3.5       2.4       3.6  (done)
      BatchNorm alone in float        33.9 98.5 %   23.6 94.8 %     30.5 98.0 %       3.5       2.1       3.7
      BatchNorm as Mul, Add in int8   33.4 98.1 %   25.3 95.3 %     24.9 99.0 %       3.5       2.2       3.6
      BatchNorm as 1x1 depthwise      34.5 97.8 %   26.7 96.1 %     24.8 98.2 %       3.7       2.5       3.8
Cost: the export, 6 s (DenseNet-121: 35); calibration, one pass over its images with minmax, four times that with the
    others; both graphs on all validation images; with a number for `keep_float`, a ranking (`layer_noise.py`): 7 s for
    ResNet-20, 158 for DenseNet-121.
Interactions: it takes the network that the fit leaves: EMA's average, KeepBest's best epoch. A mask's zeros are zeros
    still, each a byte of 0: int8 makes a sparse file no smaller, and no faster. On x86 without dot products of 8-bit
    numbers sums saturate (`processor.py`), so that a file answers otherwise there: `reduce_range` gives weights 7 bits,
    which can't (ResNet-20: right on 901 of 1,000 validation images, with 8 bits on 904). Networks that were trained
    with quantised weights (`QuantAware`) have their ranges and are exported, not quantised again.
Source: Jacob et al. 2018, "Quantization and Training of Neural Networks", https://arxiv.org/abs/1712.05877;
    Nagel et al. 2021, "A White Paper on Neural Network Quantization", https://arxiv.org/abs/2106.08295.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback

from callbacks.calibrate_onnx import METHODS, calibrated
from callbacks.calibration import image_size
from callbacks.checkpoint import random_state, set_random_state
from callbacks.layer_noise import Ranking, ranking
from callbacks.onnx_export import export_onnx
from callbacks.paired import Paired, compared
from callbacks.processor import int8_note, processor
from callbacks.protocol import OnnxFile
from callbacks.quantize_onnx import Calibration, QuantizeError, quantize, require_layers

SPLITS = ("train", "valid")


def chosen_images(number: int, images: int, seed: int) -> list[int]:
    """Places of the images to calibrate on, ascending: drawn by the seed alone.

    Args:
        number: of images that there are.
        images: how many to draw; all where there are not more.
        seed: of the draw.
    """
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:images].tolist())


def plain_batches(loader: Any, chosen: Sequence[int] | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and labels of a fastai loader, in order and without augmentation.

    Args:
        loader: a fastai `DataLoader`; its order and epoch stay.
        chosen: places of the images; None for all.

    Raises:
        QuantizeError: it augments in a way that can't be switched off, or gives something else than images and classes.
    """
    places = list(range(len(loader.dataset)) if chosen is None else chosen)
    plain = loader.new(shuffle=False, drop_last=False, get_idxs=lambda: places)
    augments = _augmenting(plain)
    if augments:
        raise QuantizeError(
            f"its training images are augmented by {augments}, which can't be switched off here: calibrate with "
            "split='valid', or without augmentation"
        )
    for batch in plain:
        if len(batch) != 2 or batch[1].ndim != 1 or batch[1].is_floating_point():
            raise QuantizeError("its batches must be images and class numbers")
        images, labels = (torch.as_tensor(part).detach().cpu() for part in batch)
        yield np.ascontiguousarray(images.float().numpy()), labels.numpy()


def _augmenting(loader: Any) -> str:
    """Name of a transform that fastai runs on training images only; empty where there is none."""
    lists = getattr(loader.dataset, "tls", ())
    pipes = [getattr(loader, name, None) for name in ("after_item", "before_batch", "after_batch")]
    for pipe in [*pipes, *(one.tfms for one in lists)]:
        for transform in getattr(pipe, "fs", ()):
            if getattr(transform, "split_idx", None) == 0:
                return type(transform).__name__
    return ""


def images_of(loader: Any, images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Some images of a loader and their labels, drawn by the seed; `(N, C, H, W)` float32 and `(N,)`.

    Args:
        loader: a fastai `DataLoader`.
        images: how many.
        seed: of the draw.
    """
    parts = [*plain_batches(loader, chosen_images(len(loader.dataset), images, seed))]
    return np.concatenate([xb for xb, _ in parts]), np.concatenate([yb for _, yb in parts])


class QuantizeInt8(Callback):
    """Makes an int8 ONNX graph of the network that a fit leaves, also of a fit of no epochs.

    Args:
        images: how many images to calibrate on.
        split: where they are drawn from: `train`, without augmentation, or `valid`.
        seed: of the draw.
        method: how ranges are found: `minmax`, `entropy` or `percentile`.
        keep_float: names of layers that stay in float; or a number: of those that bring the most noise.
        rank: whether the layers are ranked where that is not needed. The three worst are tested: what does leaving one
            in float mend on validation images?
        reduce_range: whether weights get 7 bits: for processors whose sums are short (`processor.py`).
        floor: most percentage points of top-1 on the validation images that may be lost, at least 0: a larger loss
            fails the fit. 1 is five times what 8 bits cost a network that suits them, and above twice the standard
            error on 5,000 images of which 2 % are answered otherwise.

    Raises:
        ValueError: an argument is out of its range.
    """

    # After EMA (40) and KeepBest (60) have put into the network what the fit leaves.
    order = 80

    def __init__(
        self,
        images: int = 512,
        split: str = "train",
        seed: int = 0,
        method: str = "minmax",
        keep_float: int | Sequence[str] = (),
        rank: bool = False,
        reduce_range: bool = False,
        floor: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(images, int) or images < 1:
            raise ValueError(f"images must be a whole number of at least 1, got {images}")
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if isinstance(keep_float, str) or (isinstance(keep_float, int) and keep_float < 0):
            raise ValueError(f"keep_float must be names of layers, or a number of at least 0, got {keep_float!r}")
        if not floor >= 0:
            raise ValueError(f"floor must be percentage points of at least 0, got {floor}")
        self.images, self.split, self.seed, self.method = images, split, seed, method
        self.keep_float, self.rank, self.reduce_range, self.floor = keep_float, rank, reduce_range, floor
        self._forget()

    def _forget(self) -> None:
        self._file: OnnxFile | None = None
        self._summary = ""
        self.result: Paired | None = None
        self.ranking: Ranking | None = None

    @property
    def onnx(self) -> OnnxFile | None:
        """The int8 graph; None before a fit has ended."""
        return self._file

    @property
    def summary(self) -> str:
        """What was made of what, in one line; empty before a fit has ended."""
        return self._summary

    def before_fit(self) -> None:
        """Forget what an earlier fit left; refuse validation images that are the test images, and unknown layers."""
        self._forget()
        if vars(self.learn.dls).get("valid_is_test"):
            raise ValueError(
                "the validation images are the test images, which calibrate, rank and judge nothing: cut others from "
                "the training images (valid=0.02)"
            )
        if not isinstance(self.keep_float, int) and self.keep_float and not hasattr(self.learn, "lr_finder"):
            drawn = random_state()
            try:  # names are those of the graph, and a long fit must not end with a wrong one
                require_layers(export_onnx(self.learn.model, image_size(self.learn)), self.keep_float)
            finally:
                set_random_state(drawn)

    def after_fit(self) -> None:
        """Quantise, and compare with the float network on the validation images.

        Raises:
            ValueError: it can't be exported or quantised, or loses more than `floor`.
        """
        if hasattr(self.learn, "lr_finder"):  # a mock fit, whose network is thrown away
            return
        drawn = random_state()
        try:
            self._quantise()
        finally:
            set_random_state(drawn)

    def _quantise(self) -> None:
        dls = self.learn.dls
        source = dls.train if self.split == "train" else dls.valid
        images, _ = images_of(source, self.images, self.seed)
        calibration = calibrated(export_onnx(self.learn.model, image_size(self.learn)), images, self.method)
        in_float = self._kept(calibration)
        made = quantize(calibration, in_float, reduce_range=self.reduce_range)
        result = compared(calibration.proto, made, plain_batches(dls.valid))
        if result.drop > self.floor:
            raise QuantizeError(
                f"int8 answers {result.after:,} of {result.images:,} validation images rightly, float "
                f"{result.before:,}: {result.drop:.2f} points are lost, floor={self.floor:g} are allowed "
                f"(by chance with p = {result.p:.2g}); keep_float=3 leaves the worst layers in float"
            )
        how = {"images": calibration.images, "split": self.split, "seed": self.seed, "method": calibration.method}
        how |= {"keep_float": list(in_float), "reduce_range": self.reduce_range}
        self._file = OnnxFile("model_int8.onnx", made.SerializeToString(), how, self.floor)
        self.result = result
        self._summary = "; ".join(self._told(how))

    def _kept(self, calibration: Calibration) -> tuple[str, ...]:
        """The layers that stay in float."""
        if self.rank or (isinstance(self.keep_float, int) and self.keep_float):
            self.ranking = ranking(calibration, self._drawn, reduce_range=self.reduce_range)
        if not isinstance(self.keep_float, int):
            return tuple(self.keep_float)
        return tuple(layer.name for layer in self.ranking.noise[: self.keep_float]) if self.ranking else ()

    def _drawn(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """So many validation images, batch by batch."""
        valid = self.learn.dls.valid
        return plain_batches(valid, chosen_images(len(valid.dataset), number, self.seed))

    def _told(self, how: Mapping[str, Any]) -> Iterator[str]:
        """What was made of what, in parts of a line."""
        result, names = self.result, how["keep_float"]
        bits = " with weights of 7 bits" if self.reduce_range else ""
        drawn = f"{how['images']:,} images of {how['split']} (seed {how['seed']}, {how['method']})"
        yield f"int8{bits} from {drawn}: {len(self._file.content):,} bytes"
        yield f"right on {result.after:,} of {result.images:,} validation images, float on {result.before:,}"
        yield f"the same class on {result.agreeing:,}"
        if names:
            yield f"in float: {', '.join(names)}"
        if self.ranking is not None:
            noise = {layer.name: layer.snr for layer in self.ranking.noise}
            for name, test in self.ranking.confirmed.items():
                yield f"{name} alone {noise[name]:.1f} dB, with it in float {test.told}"
        if note := int8_note(processor()[1], "reduce_range=True", reduced=self.reduce_range):
            yield note
