import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.grids.scalar import (
    ScalarGrid,
    dequantize,
    expand_groups,
    exponent_bytes,
    fits_float16,
    fixed_codebook,
    low_rank_scale,
    midpoints,
    nearest_indices,
    nearest_power,
    nearest_values,
    powers_of,
    snap_float16,
)

FIXED = ("uniform", "balanced", "int")


def random_codebook(bits, seed, *, repeats):
    """Return a sorted codebook on the float16 grid, and the generator for what comes after."""
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(2**bits, generator=generator)
    if repeats:
        codebook = codebook.round()
    return snap_float16(codebook).sort().values, generator


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 6), seed=st.integers(0, 999), repeats=st.booleans())
def test_the_nearest_value_is_the_nearest(bits, seed, repeats):
    """No codebook value is closer than the chosen one, also among values that repeat."""
    codebook, generator = random_codebook(bits, seed, repeats=repeats)
    values = 2 * torch.randn(50, generator=generator)
    indices = nearest_indices(values, codebook)
    distances = (values.double().unsqueeze(1) - codebook.double()).abs()  # (50, C)
    chosen = distances.gather(1, indices.long().unsqueeze(1)).squeeze(1)
    assert indices.dtype == torch.uint8
    assert (chosen <= distances.min(1).values + 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 6), seed=st.integers(0, 999), repeats=st.booleans())
def test_nearest_values_are_those_of_the_nearest_indices(bits, seed, repeats):
    """To the bit, on ties and beyond all numbers too: training looks nothing up, files do."""
    codebook, generator = random_codebook(bits, seed, repeats=repeats)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    values = torch.cat([2 * torch.randn(50, generator=generator), midpoints(codebook), odd])
    wanted = codebook[nearest_indices(values, codebook).long()]
    assert torch.equal(nearest_values(values, codebook), wanted)


GRIDS = [("int", 2), ("int", 4), ("int", 8), ("uint", 3), ("balanced", 2), ("uniform", 2)]
GRIDS += [("ternary", 2), ("iq4_nl", 4), ("mxfp4", 4)]


@pytest.mark.parametrize(("kind", "bits"), GRIDS)
def test_a_fixed_grid_rounds_as_compares_do(kind, bits):
    """By arithmetic or a table, to the bit: ties and their neighbours too."""
    grid, codebook = ScalarGrid(bits, kind), fixed_codebook(kind, bits)
    ties = midpoints(codebook)
    near = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (-torch.inf, torch.inf)]
    odd = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 1e30])
    nothing = torch.tensor([torch.nan])
    assert grid.round(nothing, codebook).item() == 0
    assert grid.nearest(nothing, codebook).item() == codebook[0]
    spread = torch.linspace(float(codebook[0]) - 2, float(codebook[-1]) + 2, 1001)
    values = torch.cat([ties, *near, codebook, odd, spread])
    assert torch.equal(grid.round(values, codebook), nearest_indices(values, codebook))
    assert torch.equal(grid.nearest(values, codebook), nearest_values(values, codebook))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_tie_goes_to_the_lower_value(bits):
    """Every width answers alike halfway between two values; a value itself is its own nearest."""
    codebook = fixed_codebook("int", bits)
    count = len(codebook)
    assert nearest_indices(midpoints(codebook), codebook).tolist() == list(range(count - 1))
    assert nearest_indices(codebook, codebook).tolist() == list(range(count))


def test_values_beyond_the_ends_take_the_ends():
    """Nothing wraps around."""
    codebook = fixed_codebook("uniform", 2)
    values = torch.tensor([-1e30, -float("inf"), 1e30, float("inf")])
    assert nearest_indices(values, codebook).tolist() == [0, 0, 3, 3]


def test_snapping_twice_changes_nothing_more():
    """Idempotent, and the dtype stays that of the input."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100
    snapped = snap_float16(values)
    assert snapped.dtype == torch.float32
    assert torch.equal(snap_float16(snapped), snapped)
    assert torch.equal(snapped, values.half().float())


@settings(max_examples=100, deadline=None)
@given(value=st.floats(2.0**-30, 2.0**20, width=32))
def test_the_nearest_power_of_two_is_one_of_float16(value):
    """Against trying all of them; a byte holds it."""
    powers = torch.tensor([2.0**exponent for exponent in range(-24, 16)])
    found = nearest_power(torch.tensor([value]))
    assert (found - value).abs() == (powers - value).abs().min()
    assert torch.equal(found.half().float(), found)
    assert torch.equal(powers_of(exponent_bytes(found)), found)
    assert nearest_power(torch.tensor([-value, 0.0])).tolist() == [2.0**-24] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -70000.0])
def test_what_float16_cannot_hold_is_seen(value):
    """NaN, infinity and values beyond the range are told from values at its end."""
    assert fits_float16(torch.tensor([65504.0, -65504.0, 0.0]))
    assert not fits_float16(torch.tensor([1.0, value]))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    size=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_a_weight_is_its_scale_times_its_value(rows, groups, size, seed):
    """Equal to a double loop in float64: the product of two float16 numbers is exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    codebook = snap_float16(torch.randn(8, generator=generator))
    scale = snap_float16(torch.randn(rows, groups, generator=generator).abs() + 1e-3)
    indices = torch.randint(8, (rows, groups * size), generator=generator, dtype=torch.uint8)
    weight = dequantize(indices, scale, codebook)
    for row in range(rows):
        for column in range(groups * size):
            index = int(indices[row, column])
            exact = scale[row, column // size].item() * codebook[index].item()
            assert weight[row, column].item() == exact
    assert torch.equal(dequantize(indices, expand_groups(scale, groups * size), codebook), weight)


def test_low_rank_scales_are_a_sum_of_outer_products():
    """S = sum over r of g_r a_r b_r."""
    generator = torch.Generator().manual_seed(0)
    a, g, b = (torch.randn(shape, generator=generator) for shape in ((5, 3), (3,), (3, 7)))
    expected = sum(g[r] * torch.outer(a[:, r], b[r]) for r in range(3))
    assert torch.allclose(low_rank_scale(a, g, b), expected, atol=1e-6)


@pytest.mark.parametrize("kind", FIXED)
@pytest.mark.parametrize("bits", range(2, 9))
def test_fixed_codebooks_are_ascending_evenly_spaced_and_on_the_grid(kind, bits):
    """2**bits values whose steps are equal to float16; files store them without loss."""
    codebook = fixed_codebook(kind, bits)
    steps = codebook.diff()
    assert len(codebook) == 2**bits
    assert (steps > 0).all()
    assert torch.allclose(steps, steps.mean().expand_as(steps), atol=2.0**-10)
    assert torch.equal(snap_float16(codebook), codebook)


def test_the_words_for_fixed_codebooks():
    """The values that runtimes know them by."""
    assert fixed_codebook("int", 2).tolist() == [-2, -1, 0, 1]
    assert fixed_codebook("balanced", 2).tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert fixed_codebook("uniform", 2)[[0, -1]].tolist() == [-1, 1]
    assert fixed_codebook("ternary", 1.625).tolist() == [-1, 0, 1]
    e2m1 = {sign * 2.0**e * m for sign in (1, -1) for e in (0, 1, 2) for m in (1, 1.5)}
    assert set(fixed_codebook("mxfp4", 4).tolist()) == e2m1 | {0.0, 0.5, -0.5}
    with pytest.raises(ValueError, match="codebook 'learned' is not fixed; choose uniform"):
        fixed_codebook("learned", 2)
