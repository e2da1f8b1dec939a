"""Files that become data: CIFAR from folders and archives, trees of images, and everything that must not count."""

import tarfile
from io import BytesIO
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from PIL import Image

from micronet.data import files
from micronet.data.sources import cifar10, cifar100, fetch, image_folder
from micronet.errors import MicronetError

# ---- CIFAR


def test_an_archive_cut_off_is_never_data(cache, tmp_path, monkeypatch, archive):
    with open(archive("cifar100"), "rb") as file:
        start = file.read(1_000_000)
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "cifar100.tgz").write_bytes(start)
    monkeypatch.setenv("MICRONET_DATA", str(tmp_path / "given"))
    with pytest.raises(MicronetError, match=r"cifar100\.tgz is damaged or was cut off .*: get it again") as caught:
        cifar100()
    assert "\n" not in str(caught.value)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def half_extract(archive, folder, members=400):
    """The first files of a real archive, as an interrupted `tar x` leaves them; they lie in a folder of its name."""
    with tarfile.open(archive, "r|gz") as archived:
        for _, member in zip(range(members), archived, strict=False):
            archived.extract(member, folder, filter="data")
    return folder


def test_a_half_extracted_folder_is_never_data(cache, tmp_path, monkeypatch, archive):
    half_extract(archive("cifar100"), tmp_path / "given")
    for place in (tmp_path / "given", tmp_path / "given" / "cifar100"):  # the folder of the folder, and itself
        monkeypatch.setenv("MICRONET_DATA", str(place))
        with pytest.raises(MicronetError, match="cifar100 is not the whole of cifar100: 0 of 50,000 train images"):
            fetch("cifar100")
    (tmp_path / "given" / "cifar100.tgz").symlink_to(archive("cifar100"))
    monkeypatch.setenv("MICRONET_DATA", str(tmp_path / "given"))
    entries, source = files.find_cifar("cifar100")  # the whole archive beside it serves
    assert len(entries) == 60_000
    assert source["path"].endswith("cifar100.tgz")


def test_micronet_data_without_the_set_says_so_and_downloads_nothing(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("MICRONET_DATA", str(tmp_path))
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "fastai"))
    with pytest.raises(MicronetError, match=r"holds neither a folder cifar10 nor cifar10\.tgz"):
        cifar10()
    assert not (tmp_path / "fastai").exists()


@pytest.fixture
def fastai_home(tmp_path, monkeypatch):
    """A fastai cache of its own, and no network: the proxy refuses."""
    from fastai.data.external import fastai_cfg

    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.delenv("MICRONET_DATA", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "fastai"))
    fastai_cfg.cache_clear()
    yield tmp_path / "fastai"
    fastai_cfg.cache_clear()


def test_without_a_network_one_line_says_what_to_do(cache, fastai_home):
    with pytest.raises(MicronetError, match=r"cifar10 cannot be downloaded \(.*MICRONET_DATA") as caught:
        cifar10()
    assert "\n" not in str(caught.value)


def test_fastais_half_extracted_folder_is_made_good_from_its_archive(cache, fastai_home, archive):
    half_extract(archive("cifar10"), fastai_home / "data", members=50)
    with pytest.raises(MicronetError, match="cannot be downloaded"):  # nothing to extract it from: downloads, once
        fetch("cifar10")
    (fastai_home / "archive").mkdir(exist_ok=True)
    (fastai_home / "archive" / "cifar10.tgz").symlink_to(archive("cifar10"))
    entries, source = files._through_fastai("cifar10")
    assert len(entries) == 60_000
    assert source["bytes"] == archive("cifar10").stat().st_size


def test_members_of_an_archive_are_bounded_and_stay_in_memory(tmp_path):
    path = tmp_path / "cifar10.tgz"
    with tarfile.open(path, "w:gz") as made:
        member = tarfile.TarInfo("cifar10/train/airplane/big.png")
        member.size = files.MEMBER_BYTES + 1
        made.addfile(member, BytesIO(bytes(member.size)))
    with pytest.raises(MicronetError, match="or one over 1 MB"):
        files._read_archive(path)
    with tarfile.open(path, "w:gz") as made:
        for name in ("../../../train/airplane/a.png", "/x/train/airplane/b.png", "cifar10/train/vehicles/train/c.png"):
            made.addfile(tarfile.TarInfo(name), BytesIO())
    assert [(e.split, e.label) for e in files._read_archive(path)] == [("train", "train")]


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("cifar100/train/vehicles_1/train/a.png", ("train", "train")),  # fastai's archive has super-classes
        ("./cifar100/test/apple/a.webp", ("test", "apple")),
        ("train/apple/a.png", ("train", "apple")),
        ("cifar10/labels.txt", None),
        ("cifar10/train/apple/._a.png", None),
        ("cifar10/train/a.png", None),
    ],
)
def test_the_place_of_a_file_in_a_cifar_archive(path, place):
    assert files._place(PurePosixPath(path)) == place


# ---- trees of files


def test_every_kind_of_file_becomes_rgb(cache, tmp_path, digit, tree):
    root = tree(tmp_path / "tree", ["train/a", "train/b"])
    grey = digit(7).resize((40, 30))
    kinds = {
        "grey.png": grey,
        "sixteen.png": Image.fromarray(np.asarray(grey).astype(np.uint16) * 257),
        "palette.gif": grey.quantize(),
        "rgba.webp": Image.merge("RGBA", (grey, grey, grey, Image.new("L", grey.size, 255))),
        "plain.jpeg": grey.convert("RGB"),
        "pages.tiff": grey.convert("CMYK"),
    }
    for name, picture in kinds.items():
        (root / "test" / "a").mkdir(parents=True, exist_ok=True)
        picture.save(root / "test" / "a" / name, **({"lossless": True} if name.endswith("webp") else {}))
    hidden = Image.new("RGBA", (32, 32), (9, 9, 9, 0))  # nothing of it shows
    (root / "test" / "b").mkdir()
    hidden.save(root / "test" / "b" / "hidden.png")
    (root / "test" / "b" / "notes.txt").write_text("not an image")
    (root / "test" / "b" / ".hidden.png").write_text("not an image")
    data = image_folder(root, size=30)
    assert (len(data.train), len(data.valid), len(data.test)) == (8, 2, 7)
    assert data.input_size == (3, 30, 30)
    middle = torch.from_numpy(np.asarray(grey)[:, 5:35].copy())  # the short side fits, the long one is cropped
    for image, name in zip(data.test.images[:6], sorted(kinds), strict=True):
        tolerance = 20 if name.endswith("jpeg") else 3
        assert (image.int() - middle.int()).abs().max() <= tolerance, name
    assert (data.test.images[6] == 255).all()


def test_trees_with_splits_super_classes_and_without(cache, tmp_path, tree):
    root = tree(
        tmp_path / "deep", [f"{split}/{label}" for split in ("train", "val", "test") for label in ("x/a", "y/b")]
    )
    data = image_folder(root)
    assert data.classes == ("a", "b")
    assert (len(data.train), len(data.valid), len(data.test)) == (10, 10, 10)
    assert data.mean == pytest.approx([data.train.images[:, 0].double().mean().item() / 255] * 3)
    assert data.std == pytest.approx([data.train.images[:, 0].double().std(correction=0).item() / 255] * 3)
    flat = image_folder(tree(tmp_path / "flat", ["train", "plane", "test"], each=10), valid=0.25)  # classes, not splits
    assert flat.classes == ("plane", "test", "train")
    counts = [torch.bincount(part.labels).tolist() for part in (flat.train, flat.valid, flat.test)]
    assert counts == [[6] * 3, [2] * 3, [2] * 3]
    again = image_folder(tmp_path / "flat", valid=0.25, split_seed=5)
    assert torch.equal(flat.test.images, again.test.images)
    untested = image_folder(tree(tmp_path / "untested", ["train/a", "train/b"]))
    assert untested.test is None
    assert untested.limit(4).test is None
    with pytest.raises(MicronetError, match="untested has no test images to validate on"):
        image_folder(tmp_path / "untested", valid="test")


def test_a_corrupt_file_is_named_in_one_line(cache, tmp_path, tree):
    root = tree(tmp_path / "tree", ["a", "b"])
    whole = (root / "b" / "3.png").read_bytes()
    for damage in (b"nothing like an image", whole[: len(whole) // 2], b""):
        (root / "b" / "3.png").write_bytes(damage)
        with pytest.raises(
            MicronetError, match=r"b/3\.png cannot be read as an image \(.+\): mend or remove it"
        ) as caught:
            image_folder(root)
        assert "\n" not in str(caught.value)
        assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train/a", "train/b", "test/a"], "class b has no images in test"),
        (["train/a", "train/b", "test/a", "test/b", "test/c"], "class c has no images in train"),
        (["train/a", "train/b", "extra/a"], "holds extra, train: needs train"),
        (["valid/a", "test/a"], "holds test, valid: needs train"),
        (["train/x/a", "train/y/a", "train/y/b"], "class a is in .*x/a and in .*y/a"),
        (["only"], r"has 1 class \(only\)"),
        (["a", "b/c"], None),
        (["a", "a/b"], "holds both images and the folder b"),
        (["1/2/3/4/5"], "nested too deep"),
        ([], "holds no image files"),
        (["."], "holds images itself, such as 0.png"),
    ],
)
def test_a_tree_of_another_form_is_refused_clearly(cache, tmp_path, folders, message, digit):
    (tmp_path / "tree").mkdir()
    for folder in folders:
        (tmp_path / "tree" / folder).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            digit(i).save(tmp_path / "tree" / folder / f"{i}.png")
    if message is None:
        assert image_folder(tmp_path / "tree").classes == ("a", "c")
        return
    with pytest.raises(MicronetError, match=message) as caught:
        image_folder(tmp_path / "tree")
    assert "\n" not in str(caught.value)


def test_missing_path_empty_class_and_too_few_images(cache, tmp_path, tree):
    with pytest.raises(MicronetError, match="nowhere is not a folder"):
        image_folder(tmp_path / "nowhere")
    root = tree(tmp_path / "tree", ["a", "b"], each=2)
    with pytest.raises(MicronetError, match="class a has fewer than 3 images"):
        image_folder(root)
    (root / "c").mkdir()
    with pytest.raises(MicronetError, match=r"tree/c holds no image files \(\.bmp"):
        image_folder(root)
    with pytest.raises(ValueError, match="size must be an integer of at least 1, got 0"):
        image_folder(root, size=0)
