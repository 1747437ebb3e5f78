import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.grids.packing import pack, unpack

WIDTHS = range(1, 9)
shapes = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)


def random_indices(shape, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", WIDTHS)
@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99))
def test_unpacking_gives_back_what_was_packed(bits, shape, seed):
    """Round trip for every width, odd shapes and nothing at all, in the fewest whole bytes."""
    indices = random_indices(shape, bits, seed)
    packed = pack(indices, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-indices.numel() * bits // 8)
    assert torch.equal(unpack(packed, bits, shape), indices)


@pytest.mark.parametrize("bits", WIDTHS)
def test_bytes_are_the_little_endian_number_that_the_indices_spell(bits):
    """The file format in one line: index i is digit i in base 2**bits, lowest first."""
    indices = random_indices((5, 7), bits)
    number = sum(index << (place * bits) for place, index in enumerate(indices.flatten().tolist()))
    expected = number.to_bytes(-(-35 * bits // 8), "little")
    assert bytes(pack(indices, bits).tolist()) == expected


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_any_integer_dtype_packs_alike(dtype):
    """What a caller holds indices in does not reach the file."""
    indices = random_indices((3, 5), 3)
    assert torch.equal(pack(indices.to(dtype), 3), pack(indices, 3))


def test_a_view_packs_in_its_own_order():
    """A transposed tensor packs by rows of what it shows, not by its memory."""
    indices = random_indices((4, 6), 2)
    assert torch.equal(pack(indices.T, 2), pack(indices.T.contiguous(), 2))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("extra", [-1, 1])
def test_a_damaged_length_is_refused(bits, extra):
    """Too few or too many bytes never unpack into something."""
    packed = pack(random_indices((4, 8), bits), bits)
    damaged = torch.zeros(len(packed) + extra, dtype=torch.uint8)
    with pytest.raises(ValueError, match="the file is damaged"):
        unpack(damaged, bits, (4, 8))
