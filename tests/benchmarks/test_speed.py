"""Speed as ratios, each measured in one run on this machine; numbers are printed.

Run: pytest -m benchmark tests/benchmarks -s      (about 15 minutes on 2 cores; an otherwise idle machine)
They need CIFAR-10 (MICRONET_DATA, or fastai's cache) and are skipped without it.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from PIL import Image
from rich.console import Console

from callbacks.precision import bf16_speeds_up
from callbacks.schedule import Cosine
from micronet import Fit, sgd
from micronet.data import Augment, Data, cifar10, loaders, wrn_augment
from micronet.learner import make_learner, run_fit
from micronet.models import resnet20

pytestmark = pytest.mark.benchmark
BATCH = 128


@pytest.fixture(scope="module")
def cifar(real) -> Data:
    return real(cifar10, batch_size=BATCH, augment=Augment(crop=4, flip=0.5))


@pytest.fixture(scope="module")
def files(cifar, tmp_path_factory) -> Path:
    """6,000 real CIFAR-10 images as PNG files, as fastai's own archive holds them."""
    root = tmp_path_factory.mktemp("cifar")
    images = cifar.train.images[:6000].permute(0, 2, 3, 1).numpy()
    for i, (image, label) in enumerate(zip(images, cifar.train.labels[:6000].tolist(), strict=True)):
        folder = root / ("valid" if i % 12 == 0 else "train") / cifar.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    return root


def rate(batches: Callable[[], Iterable], images: int, repeats: int = 3) -> float:
    """Images a second: the best of some passes of at least so many images, after a warm-up."""
    best = 0.0
    for attempt in range(repeats + 1):
        seen, began = 0, time.perf_counter()
        for xb, _ in itertools.chain.from_iterable(iter(batches, None)):
            seen += len(xb)
            if seen >= images:
                break
        best = max(best, seen / (time.perf_counter() - began)) if attempt else best
    return best


def fastai_loaders(files: Path, wrn: bool, workers: int) -> DataLoaders:
    """Make the loaders of fastai's own pipeline: files decoded by workers, augmented as batches."""
    from fastai.vision.augment import Brightness, Contrast, CropPad, Flip, RandomCrop, Rotate, Warp, Zoom
    from fastai.vision.data import ImageDataLoaders

    crop = RandomCrop(32)
    batch = [Flip(), Warp(), Rotate(), Zoom(), Brightness(), Contrast()] if wrn else [Flip()]
    return ImageDataLoaders.from_folder(
        files,
        train="train",
        valid="valid",
        item_tfms=[CropPad(40, pad_mode="reflection"), crop],
        batch_tfms=batch,
        bs=512,
        num_workers=workers,
    )


@pytest.mark.parametrize(
    ("augment", "wrn", "target", "aim"),
    [(Augment(crop=4, flip=0.5), False, 10, 55_000), (wrn_augment(), True, 7, 30_000)],
    ids=["crop and flip", "all six of the WRN recipe"],
)
def test_augmentation_against_fastais_own(cifar, files, augment, wrn, target, aim):
    data = Data(**{**vars(cifar), "augment": augment, "batch_size": 512})
    ours = rate(partial(getattr, loaders(data), "train"), 40_000)
    theirs = {
        workers: rate(partial(getattr, fastai_loaders(files, wrn, workers), "train"), 5000, 2)
        for workers in (0, 1, 2, 4)
    }
    fastest = max(theirs.values())
    print(
        f"\nimages/s: micronet {ours:,.0f} (aim {aim:,}); "
        f"fastai by number of workers { {w: round(r) for w, r in theirs.items()} }"
    )
    print(f"ratio {ours / fastest:.1f} (at least {target})")
    assert ours >= target * fastest


def part(data: Data, train: int, valid: int) -> Data:
    """The first images of each split: their order in the set is by class, so every so manyth of them."""
    few = {
        name: images.subset(torch.arange(0, len(images), len(images) // count)[:count])
        for name, images, count in (("train", data.train, train), ("valid", data.valid, valid))
    }
    return Data(**{**vars(data), **few})


def test_training_against_plain_fastai(cifar, files, tmp_path):
    """ResNet-20 through `make_learner` and `run_fit`, as `micronet fit` does, against the usual fastai in float32."""
    small = part(cifar, 5500, 500)  # as many as there are files
    fit = Fit("train", epochs=1, lr=0.05, schedule=Cosine(), opt=sgd())
    ours, plain = [], []
    for _ in range(2):
        began = time.perf_counter()
        learn = make_learner(fit, resnet20(num_classes=10), small)
        run_fit(learn, fit, Console(quiet=True), checkpoint=tmp_path / "checkpoint.pth")
        ours.append(len(small.train) / (time.perf_counter() - began))
        (tmp_path / "checkpoint.pth").unlink()
        plain.append(max(plain_fastai(files, workers) for workers in (0, 1, 2)))
    ratio = max(ours) / max(plain)
    print(f"\nimages/s: micronet {max(ours):.0f}, fastai in float32 {max(plain):.0f}; ratio {ratio:.2f} (at least 1.8)")
    if not bf16_speeds_up("cpu"):
        pytest.skip("this CPU has no AVX512-BF16: the ratio is printed, not asserted")
    assert ratio >= 1.8


def plain_fastai(files: Path, workers: int) -> float:
    dls = fastai_loaders(files, wrn=False, workers=workers)
    dls.train.bs = BATCH
    learn = Learner(dls, resnet20(num_classes=10), CrossEntropyLossFlat(), metrics=accuracy)
    learn.logger = lambda _: None
    with learn.no_mbar():
        began = time.perf_counter()
        learn.fit(1, 0.05)
    # The validation of 500 images is inside both clocks.
    return len(dls.train_ds) / (time.perf_counter() - began)


def test_training_against_a_bare_loop(cifar, tmp_path):
    """Everything that `micronet fit` puts around a stage, against the shortest loop that does the same arithmetic."""
    rounds = 5
    small = part(cifar, 40 * BATCH, 32)
    fit = Fit("train", epochs=1, lr=0.05, schedule=Cosine(), opt=sgd(momentum=0.9), bf16=bf16_speeds_up("cpu"))
    ratios = []
    for _ in range(rounds):
        learn = make_learner(fit, resnet20(num_classes=10), small)
        began = time.perf_counter()
        run_fit(learn, fit, Console(quiet=True), checkpoint=tmp_path / "checkpoint.pth")
        framework = time.perf_counter() - began
        (tmp_path / "checkpoint.pth").unlink()
        ratios.append(framework / bare_loop(small, fit))
    ratio = statistics.median(ratios)
    print(f"\nmicronet / bare loop, seconds: {ratio:.3f} (at most 1.10), rounds {[round(r, 3) for r in ratios]}")
    assert ratio <= 1.10


def bare_loop(data: Data, fit: Fit) -> float:
    model = resnet20(num_classes=10).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), fit.lr, 0.9, weight_decay=fit.wd, nesterov=True)
    batches = loaders(data).train
    began = time.perf_counter()
    for xb, yb in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(fit.bf16)):
            logits = model(xb)
        loss = torch.nn.functional.cross_entropy(logits.float(), yb)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began
