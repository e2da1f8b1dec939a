"""Splits: what a cut and a limit keep, and what an image set is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micronet.data.sources import digits
from micronet.data.splits import ImageSet, spread, stratified_cut

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=120).map(torch.tensor)


@settings(max_examples=60, deadline=None)
@given(LABELS, st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
def test_a_cut_covers_everything_once_and_each_class_by_its_share(labels, share, seed):
    rest, cut = stratified_cut(labels, share, seed)
    assert sorted(torch.cat([rest, cut]).tolist()) == list(range(len(labels)))
    total, taken = torch.bincount(labels, minlength=6), torch.bincount(labels[cut], minlength=6)
    assert ((taken - share * total).abs() <= 1).all()
    assert (taken < total)[total > 0].all()
    assert (taken > 0)[total > 1].all()
    assert torch.equal(cut, stratified_cut(labels, share, seed)[1])


@settings(max_examples=60, deadline=None)
@given(LABELS, st.integers(1, 130))
def test_a_limit_is_exact_keeps_every_class_and_the_proportions(labels, images):
    kept = spread(labels, images)
    assert len(kept) == len(kept.unique()) == min(images, len(labels))
    total, taken = torch.bincount(labels, minlength=6), torch.bincount(labels[kept], minlength=6)
    present = int((total > 0).sum())
    assert int((taken > 0).sum()) == min(present, images, len(labels))
    assert ((taken - len(kept) / len(labels) * total).abs() <= 1 + present).all()


def test_limit_bounds_each_split_and_refuses_nothing():
    small = digits().limit(30)
    assert (len(small.train), len(small.valid), len(small.test)) == (30, 30, 30)
    assert torch.bincount(small.train.labels, minlength=10).min() >= 2
    assert torch.equal(small.train.images, digits().limit(30).train.images)
    with pytest.raises(ValueError, match="images must be at least 1, got 0"):
        small.limit(0)


def test_an_image_set_keeps_its_layout_and_refuses_another():
    whole = digits().test
    part = whole.subset(torch.tensor([5, 2]))
    assert torch.equal(part.images, whole.images[[5, 2]])
    assert part.labels.tolist() == whole.labels[[5, 2]].tolist()
    assert part.images.permute(0, 2, 3, 1).is_contiguous()
    for images, labels, message in (
        (whole.images.contiguous(), whole.labels, "channels_last"),
        (whole.images.float(), whole.labels, "uint8"),
        (whole.images, whole.labels[1:], "labels must be int64"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageSet(images, labels)
