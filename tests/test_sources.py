"""Data sets that recipes name: facts about the real ones, and their arguments."""

import tarfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from micronet.data import sources, usual_augment
from micronet.data.sources import cifar10, cifar100, digits, fetch, image_folder
from micronet.errors import MicronetError

PUBLISHED = {  # mean and standard deviation of the training images, as the field quotes them
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar_name(request, monkeypatch, archive):
    """Real CIFAR, in the user's own cache: decoded once on a machine."""
    monkeypatch.setenv("MICRONET_DATA", str(archive(request.param).parent))
    return request.param


def counts(part, classes=10):
    return torch.bincount(part.labels, minlength=classes).tolist()


def pixels(part):
    return part.images.permute(0, 2, 3, 1)


# ---- digits


def test_digits_are_scikit_learns_enlarged_and_split_without_overlap():
    data, bunch = digits(), load_digits()
    parts = (data.train, data.valid, data.test)
    assert sum(map(len, parts)) == 1797
    assert sum(np.array(counts(part)) for part in parts).tolist() == np.bincount(bunch.target).tolist()
    # a corner of a bilinear enlargement is the corner of the original, and the average of a 4x4 block stays close to it
    images = torch.cat([part.images for part in parts]).float() / 255
    assert sorted(images[:, 1, 0, -1].tolist()) == pytest.approx(sorted(bunch.images[:, 0, -1] / 16), abs=0.6 / 255)
    assert images.mean().item() == pytest.approx(bunch.images.mean() / 16, abs=1e-3)
    assert images.amax().item() == 1
    assert torch.equal(images[:, 0], images[:, 2])
    assert data.mean == pytest.approx(
        [torch.cat([p.images for p in parts[:2]])[:, c].double().mean().item() / 255 for c in range(3)]
    )
    assert (data.num_classes, data.input_size, data.classes[3]) == (10, (3, 32, 32), "3")
    assert all(pixels(part).is_contiguous() and part.labels.dtype == torch.int64 for part in parts)


def test_the_test_split_is_fixed_and_the_seed_moves_valid_only():
    first, again, other = digits(), digits(), digits(split_seed=1, valid=0.2)
    assert torch.equal(first.valid.images, again.valid.images)
    assert torch.equal(first.test.images, other.test.images)
    assert not torch.equal(first.valid.images, other.valid.images[: len(first.valid)])
    assert (len(first.valid), len(other.valid)) == (143, 287)
    assert first.mean == other.mean


def test_validating_on_test_is_marked():
    data = digits(valid="test", batch_size=7, augment="any")
    assert data.valid is data.test
    assert data.valid_is_test
    assert not digits().valid_is_test
    assert len(data.train) == len(digits().train) + len(digits().valid)
    assert (data.batch_size, data.augment) == (7, "any")
    small = data.limit(20)
    assert small.valid is small.test
    assert len(small.test) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid": 0.0}, r"valid must be a fraction in \(0, 1\) or \"test\", got 0.0"),
        ({"valid": 1}, "valid must be a fraction .* got 1"),
        ({"valid": "train"}, "got 'train'"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"split_seed": -1}, r"split_seed must be an integer in \[0, 2\*\*32\), got -1"),
    ],
)
@pytest.mark.parametrize("source", [digits, cifar100, lambda **options: image_folder("nowhere", **options)])
def test_arguments_are_checked_before_anything_is_read(source, options, message):
    with pytest.raises(ValueError, match=message):
        source(**options)


def test_only_photographs_are_mirrored(tmp_path):
    assert usual_augment("cifar10").flip == usual_augment("cifar100").flip == 0.5
    assert usual_augment("digits") is None
    assert usual_augment(str(tmp_path)) is None


def test_fetch_names_the_sets():
    assert (fetch("digits") / "digits.csv.gz").is_file()
    with pytest.raises(MicronetError, match="no data set 'mnist' to fetch: choose one of digits, cifar10, cifar100"):
        fetch("mnist")


# ---- CIFAR


def test_cifar_is_the_published_one(cifar_name):
    classes = {"cifar10": 10, "cifar100": 100}[cifar_name]
    data = getattr(sources, cifar_name)()
    assert [round(x, 4) for x in data.mean] == list(PUBLISHED[cifar_name][0])
    assert [round(x, 4) for x in data.std] == list(PUBLISHED[cifar_name][1])
    assert counts(data.train, classes) == [45_000 // classes] * classes
    assert counts(data.valid, classes) == [5_000 // classes] * classes
    assert counts(data.test, classes) == [10_000 // classes] * classes
    assert data.num_classes == classes
    assert list(data.classes) == sorted(data.classes)
    assert {"cifar10": "airplane", "cifar100": "apple"}[cifar_name] == data.classes[0]
    whole = getattr(sources, cifar_name)(valid="test")
    assert len(whole.train) == 50_000
    assert pixels(whole.test).is_contiguous()


def test_cached_cifar_is_ready_within_a_second(cifar_name):
    source = {"cifar10": cifar10, "cifar100": cifar100}[cifar_name]
    source()
    times = []
    for _ in range(3):
        start = time.process_time()  # not what others on the machine take
        source()
        times.append(time.process_time() - start)
    assert min(times) < 1


def test_the_cache_holds_what_pillow_reads_in_the_archive(cifar_name, archive):
    data = getattr(sources, cifar_name)(valid="test")
    first: dict[str, np.ndarray] = {}
    with tarfile.open(archive(cifar_name), "r|gz") as members:
        for member in members:
            split, label, file = Path(member.name).parts[1:] if member.isfile() else ("", "", "")
            if split == "train" or len(first) == 300:
                break  # test comes first in the archive
            if file:
                first[f"{label}/{file}"] = np.asarray(Image.open(BytesIO(members.extractfile(member).read())))
    assert len(first) == 300
    assert list(first) == sorted(first)
    assert np.array_equal(pixels(data.test)[:300].numpy(), np.stack(list(first.values())))
    assert data.classes[data.test.labels[0]] == next(iter(first)).split("/")[0]
