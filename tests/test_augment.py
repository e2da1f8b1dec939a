"""Augmentation: exact where it can be exact, reproducible, one draw an image."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from micronet.data.augment import (
    Augment,
    augment_batch,
    cutout,
    gather,
    homographies,
    lighting,
    resample,
    wrn_augment,
)


def pictures(count: int = 4, height: int = 12, width: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def padded(images: torch.Tensor, pad: int, mode: str) -> torch.Tensor:
    nchw = images.permute(0, 3, 1, 2).float()
    out = F.pad(nchw, (pad,) * 4, mode=mode) if mode == "reflect" else F.pad(nchw, (pad,) * 4)
    return out.permute(0, 2, 3, 1).to(torch.uint8).contiguous()


@settings(max_examples=30, deadline=None)
@given(top=st.integers(0, 6), left=st.integers(0, 6), flipped=st.booleans(), index=st.integers(0, 3))
def test_gather_is_a_slice_of_the_padded_image(top, left, flipped, index):
    images = padded(pictures(), 3, "reflect")
    window = gather(
        images, torch.tensor([index]), torch.tensor([top]), torch.tensor([left]), torch.tensor([flipped]), (12, 10)
    )
    expected = images[index, top : top + 12, left : left + 10].float()
    assert torch.equal(window[0], expected.flip(1) if flipped else expected)


@pytest.mark.parametrize("pad", ["reflect", "zeros"])
@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (3, -2), (-1, 3)])
@pytest.mark.parametrize("mirror", [1.0, -1.0])
def test_resampling_a_shift_and_flip_equals_padding_and_cropping(pad, dx, dy, mirror):
    images = pictures()
    matrix = torch.tensor([[mirror, 0, 2 * dx / 9], [0, 1, 2 * dy / 11], [0, 0, 1.0]])
    drawn = resample(images.float(), matrix.expand(4, 3, 3), pad)
    whole = padded(images, 3, pad)
    expected = whole[:, 3 + dy : 15 + dy, 3 + dx : 13 + dx].float()
    expected = expected if mirror == 1 else expected.flip(2)
    torch.testing.assert_close(drawn, expected, atol=2e-3, rtol=0)


def test_rotation_by_90_degrees_moves_pixels_where_it_should():
    image = torch.zeros(1, 9, 9, 3)
    image[0, 0, 4] = 255.0  # top centre
    augment = Augment(rotate=90.0, share=1.0)
    generator = torch.Generator().manual_seed(0)
    angles = []
    for _ in range(50):
        matrix = homographies(augment, 1, (9, 9), generator)[0]
        assert torch.linalg.det(matrix[:2, :2]).item() == pytest.approx(1.0, abs=1e-5)
        angles.append(math.degrees(math.atan2(matrix[1, 0], matrix[0, 0])))
    assert max(map(abs, angles)) <= 90.0001
    assert min(angles) < -30 < 30 < max(angles)
    quarter = torch.tensor([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]])
    turned = resample(image, quarter, "zeros")
    place = (turned[0, :, :, 0] > 128).nonzero().tolist()
    assert place in ([[4, 0]], [[4, 8]])


@pytest.mark.parametrize("tilt", [-0.2, 0.1, 0.2])
def test_warp_scales_opposite_borders_by_the_stated_shares(tilt):
    lean = torch.tensor([[1, 0, tilt], [0, 1 - tilt**2, 0], [tilt, 0, 1.0]])
    for x, expected in ((-1.0, 1 + tilt), (1.0, 1 - tilt)):
        moved = lean @ torch.tensor([x, 1.0, 1.0])
        moved = moved / moved[2]
        assert moved[0].item() == pytest.approx(x, abs=1e-6)
        assert moved[1].item() == pytest.approx(expected, abs=1e-6)
    drawn = homographies(Augment(warp=0.2, share=1.0), 200, (32, 32), torch.Generator().manual_seed(0))
    corner = drawn @ torch.tensor([-1.0, -1.0, 1.0])
    corner = corner[:, :2] / corner[:, 2:]
    assert corner.abs().max() <= 1.2 * 1.2 + 1e-4
    assert corner.std() > 0.1


def test_zoom_only_magnifies_and_within_its_range():
    drawn = homographies(Augment(zoom=1.5, share=1.0), 500, (32, 32), torch.Generator().manual_seed(0))
    scale = 1 / drawn[:, 0, 0]
    assert scale.min() >= 1 - 1e-6
    assert scale.max() <= 1.5 + 1e-6
    assert scale.mean().item() == pytest.approx(0.5 / math.log(1.5), abs=0.02)  # mean of a log-uniform draw


def test_share_is_the_share_of_images_touched():
    drawn = homographies(Augment(rotate=10.0, share=0.75), 4000, (32, 32), torch.Generator().manual_seed(0))
    turned = (drawn[:, 1, 0] != 0).float().mean().item()
    assert turned == pytest.approx(0.75, abs=0.03)


def test_lighting_keeps_grey_where_contrast_alone_changes_and_clips():
    generator = torch.Generator().manual_seed(0)
    grey = torch.full((64, 2, 2, 3), 127.5)
    assert torch.allclose(lighting(grey.clone(), Augment(contrast=0.5, share=1.0), generator), grey, atol=1e-3)
    bright = lighting(torch.full((64, 2, 2, 3), 250.0), Augment(brightness=0.5, share=1.0), generator)
    assert bright.max() == 255
    assert bright.min() >= 250 - 127.5 - 1e-3
    assert len({round(x, 3) for x in bright[:, 0, 0, 0].tolist()}) > 10  # one draw an image


def test_cutout_zeroes_one_square_at_most_side_by_side():
    out = cutout(torch.ones(200, 16, 16, 3), 6, torch.Generator().manual_seed(0))
    zeros = (out[..., 0] == 0).sum((1, 2))
    assert zeros.max() == 36
    assert zeros.min() >= 9  # the centre is inside the image
    assert (out[..., 0] == out[..., 2]).all()


@pytest.mark.parametrize("augment", [Augment(crop=4, flip=0.5), wrn_augment()])
def test_same_seed_same_batch_and_images_differ_from_each_other(augment):
    images = padded(pictures(1, 32, 32), augment.crop, "reflect").expand(1, -1, -1, -1).contiguous()
    index = torch.zeros(8, dtype=torch.int64)
    first = augment_batch(images, index, augment, torch.Generator().manual_seed(5))
    again = augment_batch(images, index, augment, torch.Generator().manual_seed(5))
    other = augment_batch(images, index, augment, torch.Generator().manual_seed(6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(image.flatten()[:200].tolist()) for image in first}) >= 7
    assert first.shape == (8, 32, 32, 3)
    assert first.min() >= 0
    assert first.max() <= 255.001


@pytest.mark.parametrize(
    ("argument", "value"),
    [("crop", -1), ("crop", 1.5), ("flip", 1.1), ("zoom", 0.9), ("rotate", -1), ("warp", 0.5), ("pad", "edge")]
    + [("brightness", 2), ("contrast", 1), ("share", -0.1), ("cutout", True)],
)
def test_bad_ranges_are_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be"):
        Augment(**{argument: value})
