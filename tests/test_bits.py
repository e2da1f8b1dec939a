"""Codes and masks in bytes without gaps, and entropy-coded: what is written is read, in as many bytes as promised."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from micronet.bits import CHUNK, pack_bits, packed_size, unpack_bits, unpack_mask
from micronet.entropy import Decoder, Encoder

drawn = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def test_the_lowest_bits_come_first():
    # As ONNX packs int4: the first code is the low half of the byte.
    assert pack_bits(np.array([1, 2, 15]), 4).tolist() == [0x21, 0x0F]
    # 3 bits: 1, 2, 3, 4 are 100 010 110 001 from the lowest bit on: 11010001 read backwards, then 1000.
    assert pack_bits(np.array([1, 2, 3, 4]), 3).tolist() == [0b11010001, 0b00001000]
    assert pack_bits(np.array([-1, -8, 7]), 4).tolist() == [0x8F, 0x07]  # two's complement
    # A mask of three bits, then codes of two: 101 then 11 and 01.
    assert pack_bits(np.array([3, 2]), 2, np.array([True, False, True])).tolist() == [0b1011101]


@drawn
@given(st.integers(1, 8), st.booleans(), st.integers(0, 70), st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_codes_of_any_width_come_back(bits, signed, count, masked, seed):
    rng = np.random.default_rng(seed)
    low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    codes, mask = rng.integers(low, high, count), rng.random(masked) < 0.5
    data = pack_bits(codes, bits, mask)
    assert data.dtype == np.uint8
    assert data.size == packed_size(count, bits, masked) == -(-(masked + count * bits) // 8)
    assert unpack_mask(data, masked).tolist() == mask.tolist()
    assert unpack_bits(data, bits, count, signed=signed, mask=masked).tolist() == codes.tolist()


def test_more_codes_than_are_spread_at_a_time():
    codes = np.random.default_rng(0).integers(-4, 4, CHUNK + 5)
    mask = np.arange(3) > 0
    data = pack_bits(codes, 3, mask)
    assert data.size == packed_size(codes.size, 3, 3)
    assert (unpack_bits(data, 3, codes.size, signed=True, mask=3) == codes).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="codes from 0 to 16 don't fit into 4 bits"):
        pack_bits(np.array([16, 0]), 4)
    with pytest.raises(ValueError, match="codes from -1 to 8 don't fit"):
        pack_bits(np.array([-1, 8]), 4)
    with pytest.raises(ValueError, match="bits must be a width from 1 to 8, got 9"):
        pack_bits(np.array([1]), 9)
    with pytest.raises(ValueError, match="are not 2 bytes"):
        unpack_bits(np.zeros(2, np.uint8), 4, 5, signed=False)
    with pytest.raises(ValueError, match="bits are left over"):
        unpack_bits(np.array([0x12, 0xF3], np.uint8), 4, 3, signed=False)
    with pytest.raises(ValueError, match="can't hold a mask of 9 elements"):
        unpack_mask(np.zeros(1, np.uint8), 9)


@drawn
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 8), st.floats(0, 1), st.booleans()), max_size=4))
def test_what_is_coded_comes_back(arrays):
    encoder, kept = Encoder(), []
    rng = np.random.default_rng(0)
    for dims, bits, share, sparse in arrays:
        shape = ((5,), (6, 7), (4, 3, 5), (4, 3, 3, 3))[dims]
        mask = rng.random(shape) < share if sparse else None
        count = int(mask.sum()) if sparse else int(np.prod(shape))
        codes = (rng.geometric(0.4, count) % (1 << bits)).astype(np.uint8)
        if encoder.add(mask, codes, bits):
            kept.append((shape, mask, codes, bits))
    decoder = Decoder(encoder.data())
    for shape, mask, codes, bits in kept:
        if mask is not None:
            assert (decoder.mask(shape) == mask).all()
        assert (decoder.codes(codes.size, bits) == codes).all()


def test_the_coder_is_near_the_entropy_and_never_above_the_bits():
    rng = np.random.default_rng(0)
    mask, codes = rng.random((64, 64, 3, 3)) < 0.1, rng.binomial(14, 0.5, 20_000).astype(np.uint8)
    for given_, bits, entropy in (
        ((mask, None), 0, mask.size * 0.4690),  # -0.1 log2 0.1 - 0.9 log2 0.9
        ((None, codes), 4, codes.size * 2.9510),  # of a binomial distribution of 14 tosses
    ):
        encoder = Encoder()
        assert encoder.add(*given_, bits)
        assert 0.98 * entropy < encoder.data().size * 8 < 1.02 * entropy
    encoder = Encoder()
    assert not encoder.add(rng.random((8, 8, 3, 3)) < 0.5, None)  # nothing to gain
    assert not encoder.add(None, rng.integers(0, 256, 1000).astype(np.uint8), 8)
    assert encoder.data().size == 0


def test_kernels_that_are_emptied_as_a_whole_take_less():
    rng = np.random.default_rng(0)
    scattered = rng.random((32, 32, 3, 3)) < 0.3
    whole = np.broadcast_to((rng.random((32, 32, 1, 1)) < 0.3), scattered.shape)
    sizes = []
    for mask in (scattered, whole):
        encoder = Encoder()
        assert encoder.add(mask, None)
        sizes.append(encoder.data().size)
    assert sizes[1] < sizes[0] / 3


@drawn
@given(st.binary(max_size=40))
def test_any_bytes_are_decoded_or_refused(data):
    try:
        decoder = Decoder(np.frombuffer(data, np.uint8))
        assert decoder.mask((4, 5, 3, 3)).shape == (4, 5, 3, 3)
        assert decoder.codes(300, 3).max() < 8
    except ValueError:
        pass
