import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.grids.scalar import dequantize, expand_groups, nearest_indices, snap_float16
from qat.grids.scales import fit_group_scale, start_scale
from qat.quant.fit import (
    IMPORTANCE_FLOOR,
    fit_weight,
    floored,
    learned_codebook,
    update_codebook,
    weighted_error,
)
from qat.quant.spec import make_spec

SPECS = {
    "group": make_spec(bits=2, group_size=8),
    "row": make_spec(bits=3, group_size=0),
    "rank": make_spec(bits=2, rank=2),
    "uniform": make_spec(bits=4, group_size=8, codebook="uniform"),
    "balanced rank": make_spec(bits=2, rank=3, codebook="balanced"),
    "int": make_spec(bits=2, group_size=8, codebook="int"),
    "affine": make_spec(bits=3, group_size=8, codebook="uint"),
    "mxfp4": make_spec(bits=4, group_size=8, codebook="mxfp4"),
    "ternary": make_spec(bits=2, group_size=16, codebook="ternary"),
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape, seed=0):
    """Return weights with a long tail, as trained ones have."""
    return random(*shape, seed=seed) * random(*shape, seed=seed + 1).exp()


def error_of(weight, indices, scale, codebook, importance):
    """Return the weighted error in float64, and how much of it float16 rounding may have added.

    A scale or a value of 11 bits moves each weight by 2**-11 of itself at most.
    """
    fitted = dequantize(indices, scale, codebook).double()
    error = ((weight - fitted) ** 2 * importance).sum().item()
    return error, ((fitted * 2**-11) ** 2 * importance).sum().item() + 1e-6 * error


@settings(max_examples=6, deadline=None)
@given(bits=st.integers(2, 4), groups=st.integers(1, 4), seed=st.integers(0, 999))
def test_no_update_raises_the_error(bits, groups, seed):
    """Scales, codebook and indices in turn: the weighted error only falls, to float16."""
    weight, importance = heavy(6, groups * 8, seed=seed), random(groups * 8, seed=seed).mul(2).exp()
    scale = start_scale(weight, importance, groups)
    codebook = learned_codebook(weight, scale, importance, bits)
    indices = nearest_indices(weight / expand_groups(scale, groups * 8), codebook)
    error, _ = error_of(weight, indices, scale, codebook, importance)
    for _ in range(4):
        scale = fit_group_scale(weight, codebook[indices.int()], importance, scale)
        former, (error, slack) = error, error_of(weight, indices, scale, codebook, importance)
        assert error <= former + slack
        full = expand_groups(scale, groups * 8)
        codebook = update_codebook(weight, indices, full, importance, codebook)
        indices = nearest_indices(weight / full, codebook)
        former, (error, slack) = error, error_of(weight, indices, scale, codebook, importance)
        assert error <= former + slack


@pytest.mark.parametrize("name", SPECS)
def test_more_rounds_are_never_worse(name):
    """The fit goes downhill for every kind of scale and codebook."""
    weight, importance = heavy(64, 64), random(64, seed=5).exp()
    errors = [
        weighted_error(
            weight,
            fit_weight(weight, SPECS[name], importance=importance, num_rounds=rounds),
            floored(importance, weight),
        )
        for rounds in (1, 3, 8)
    ]
    assert errors[1] <= errors[0] * 1.002
    assert errors[2] <= errors[1] * 1.002


@pytest.mark.parametrize("name", SPECS)
def test_a_fit_can_be_stored_and_says_what_it_is(name):
    """Float16 scales and codebook, indices within the codebook, and W_hat formed from them."""
    spec = SPECS[name]
    quantized = fit_weight(heavy(24, 32), spec)
    factors = quantized.low_rank or (quantized.scale,)
    for part in (quantized.codebook, *factors):
        assert torch.equal(snap_float16(part), part)
    assert (quantized.codebook.diff() >= 0).all()
    assert quantized.indices.dtype == torch.uint8
    assert quantized.indices.max() < 2**spec.bits
    scale, offset = quantized.expand()
    expected = quantized.codebook[quantized.indices.long()] * expand_groups(scale, 32)
    if offset is not None:
        assert torch.equal(snap_float16(offset), offset)
        expected = expected + expand_groups(offset, 32)
    assert torch.equal(quantized.dequantize(), expected)


@pytest.mark.recipe
@settings(max_examples=8, deadline=None)
@given(bits=st.integers(2, 5), size=st.sampled_from([8, 16, 32]), seed=st.integers(0, 999))
def test_offsets_are_no_worse_than_none_on_shifted_weights(bits, size, seed):
    """Groups that lie to one side of zero waste half of a symmetric grid."""
    weight = random(8, 64, seed=seed) + 3 * random(8, 1, seed=seed + 1).sign()
    importance = random(64, seed=seed + 2).exp()
    errors = [
        weighted_error(
            weight,
            fit_weight(
                weight,
                make_spec(bits, group_size=size, codebook=codebook),
                importance=importance,
            ),
            importance,
        )
        for codebook in ("uint", "int")
    ]
    assert errors[0] <= errors[1]


@settings(max_examples=8, deadline=None)
@given(bits=st.integers(2, 8), seed=st.integers(0, 999))
def test_a_weight_on_an_affine_grid_is_found_again(bits, seed):
    """Scales and offsets that are exact in float32: not a bit is lost."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(2**bits, (4, 64), generator=generator)
    indices[:, ::32], indices[:, 1::32] = 0, 2**bits - 1  # the whole range in each group
    scale = 2.0 ** torch.randint(-6, 0, (4, 2), generator=generator)
    offset = torch.randint(-40, 40, (4, 2), generator=generator) / 8
    weight = indices * expand_groups(scale, 64) + expand_groups(offset, 64)
    fitted = fit_weight(weight, make_spec(bits, codebook="uint"))
    assert torch.equal(fitted.dequantize(), weight)


@pytest.mark.parametrize("bits", [2, 4])
def test_more_bits_cost_less_error(bits):
    """And eight bits are nearly the weight itself."""
    weight = heavy(32, 64)
    errors = {
        bits: weighted_error(weight, fit_weight(weight, make_spec(bits=bits)), torch.ones(64))
        for bits in (2, 3, 4, 6, 8)
    }
    assert sorted(errors.values(), reverse=True) == list(errors.values())
    assert errors[8] < 1e-4


def test_a_weight_on_the_grid_is_found_again():
    """Four values times one scale: nothing is lost but the last bit."""
    values = torch.tensor([-0.75, -0.25, 0.3, 1.1])
    indices = torch.randint(4, (16, 32), generator=torch.Generator().manual_seed(0))
    weight = values[indices] * 0.02
    quantized = fit_weight(weight, make_spec(bits=2, group_size=0))
    assert torch.allclose(quantized.dequantize(), weight, rtol=2e-3, atol=0)


def test_importance_moves_the_error_to_where_it_does_not_count():
    """The weighted fit is better by its own measure than the unweighted one."""
    weight, importance = heavy(24, 64), torch.ones(64)
    importance[:4] = 1000.0
    spec = make_spec(bits=2, group_size=16)
    weighted = weighted_error(weight, fit_weight(weight, spec, importance=importance), importance)
    plain = weighted_error(weight, fit_weight(weight, spec), importance)
    assert weighted < 0.5 * plain


def test_only_ratios_of_importance_count():
    """Twice the calibration data gives the same student, to the bit."""
    weight, importance = heavy(16, 32), random(32, seed=3).exp()
    first = fit_weight(weight, make_spec(bits=3, group_size=8), importance=importance)
    second = fit_weight(weight, make_spec(bits=3, group_size=8), importance=importance * 1024)
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.dequantize(), second.dequantize())


def test_a_silent_channel_still_counts_a_little():
    """What was zero in calibration may speak later: its weights do not become arbitrary."""
    importance = floored(torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.zeros(2, 4))
    assert importance.tolist() == pytest.approx([IMPORTANCE_FLOOR, 1, 1, 2])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", ["zeros", "dead row and column", "constant", "tiny", "huge"])
def test_degenerate_weights_give_finite_students(name, kind):
    """Padded, pruned and constant layers exist; zeros stay zeros."""
    weight = {
        "zeros": torch.zeros(16, 32),
        "dead row and column": heavy(16, 32),
        "constant": torch.full((16, 32), 0.37),
        "tiny": 1e-7 * random(16, 32),
        "huge": 2000 * random(16, 32).clamp(-6, 6),
    }[kind]
    if kind == "dead row and column":
        weight[3], weight[:, 5], weight[:, 8:16] = 0.0, 0.0, 0.0
    fitted = fit_weight(weight, SPECS[name]).dequantize()
    assert torch.isfinite(fitted).all()
    if kind == "zeros" and SPECS[name].grid.is_learned:
        assert torch.equal(fitted, weight)


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (3, 5), (40, 24)])
@pytest.mark.parametrize("spec", [make_spec(bits=2, group_size=0), make_spec(bits=4, rank=1)])
def test_any_shape_of_weight_fits(shape, spec):
    """One row, one column, odd sides."""
    assert fit_weight(random(*shape), spec).dequantize().shape == shape


@pytest.mark.parametrize(
    ("weight", "spec", "importance", "message"),
    [
        (torch.full((4, 8), float("nan")), {}, None, "NaN, infinity or values beyond 65504"),
        (torch.full((4, 8), 1e6), {}, None, "NaN, infinity or values beyond 65504"),
        (torch.ones(4, 8), {"rank": 5}, None, "rank 5 exceeds the smaller side"),
        (torch.ones(4, 12), {"group_size": 8}, None, "group size 8 does not divide a row of 12"),
        (torch.ones(4, 8), {}, torch.ones(4), "one per input"),
        (torch.full((8, 64), 6e4), {"rank": 1}, None, "do not fit float16; take group scales"),
        (torch.ones(4, 8), {}, torch.full((8,), float("inf")), "must be finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(weight, spec, importance, message):
    """With the value and the remedy, before any work."""
    spec = make_spec(**{"bits": 2, "group_size": 8, **spec})
    with pytest.raises(ValueError, match=message):
        fit_weight(weight, spec, importance=importance)
