"""Properties of the fit against H, on random layers whose inputs are correlated."""

import pytest
import torch

from qat.grids.scalar import nearest_power
from qat.model.surgery import dense_weights, quantized_layers
from qat.pipelines.fit_layers import FitTask, fit_by_decoder_layers
from qat.quant import hessian as hessian_fit
from qat.quant.drift import Correction, Moments, wanted_weight
from qat.quant.fit import fit_weight
from qat.quant.hessian import (
    dampen,
    descend,
    falling_order,
    feed_errors,
    feedback_factor,
    fit_with_hessian,
    full_scale,
    hessian_error,
    refit_codebook,
    refit_scale,
)
from qat.quant.normal_equations import change_in_error, descend_scales
from qat.quant.spec import TensorSpec, make_spec
from tests.tiny import TINY_MODELS, plan_of

SPECS = {
    "learned 2": make_spec(bits=2, group_size=16),
    "learned 4": make_spec(bits=4, group_size=16),
    "int 2": make_spec(bits=2, group_size=16, codebook="int"),
    "int 4": make_spec(bits=4, group_size=16, codebook="int", stored_dtype="bfloat16"),
    "balanced": make_spec(bits=2, group_size=16, codebook="balanced"),
    "row scale": make_spec(bits=2, group_size=0),
    "low rank": make_spec(bits=2, rank=4),
    "affine": make_spec(bits=3, group_size=16, codebook="uint"),
    "mxfp4": make_spec(bits=4, group_size=16, codebook="mxfp4"),
    "ternary": make_spec(bits=2, group_size=48, codebook="ternary"),
}


@pytest.fixture(params=SPECS)
def spec(request) -> TensorSpec:
    return SPECS[request.param]


def random_inputs(num_inputs: int, *, seed: int = 0, num_tokens: int = 512) -> torch.Tensor:
    """Return correlated inputs whose channels differ in size, (tokens, I)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_inputs, num_inputs, generator=generator) / num_inputs**0.5
    loudness = torch.randn(num_inputs, generator=generator).exp()
    x = torch.randn(num_tokens, num_inputs, generator=generator)
    return (x @ mix + 0.5 * x) * loudness


def random_layer(
    num_outputs: int = 24, num_inputs: int = 96, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight (O, I) and the damped H of its inputs."""
    x = random_inputs(num_inputs, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * 0.05
    return weight, dampen(x.T @ x / len(x))


def test_error_feedback_beats_plain_rounding(spec):
    """Feeding errors forward lowers tr(E H E^T), on every draw, against rounding by moments."""
    for seed in range(2):
        weight, hessian = random_layer(seed=seed)
        plain = fit_weight(weight, spec, importance=hessian.diagonal())
        fed = feed_errors(weight, plain, hessian)
        assert hessian_error(weight, fed, hessian) < hessian_error(weight, plain, hessian)


def test_error_feedback_equals_elimination_one_column_at_a_time():
    """The blocked triangular form is the plain loop that inverts H again after each column."""
    weight, hessian = random_layer(6, 80, seed=3)
    start = fit_weight(weight, SPECS["learned 2"], importance=hessian.diagonal())
    fed = feed_errors(weight, start, hessian)
    scale, codebook = full_scale(start).double(), start.codebook.double()
    work, left = weight.double().clone(), falling_order(hessian).tolist()
    expected = torch.zeros_like(fed.indices)
    while left:
        inverse = torch.linalg.inv(hessian.double()[left][:, left])
        column = left[0]
        for row in range(len(work)):
            candidates = codebook * scale[row, column]
            expected[row, column] = (work[row, column] - candidates).abs().argmin()
            error = work[row, column] - candidates[expected[row, column].int()]
            work[row, left] -= error / inverse[0, 0] * inverse[0]
        left = left[1:]
    assert (fed.indices != expected).float().mean() < 0.005  # ties that float32 decides otherwise


def test_feedback_factor_is_the_root_of_the_inverse():
    """U is upper triangular and U^T U = H^-1."""
    _, hessian = random_layer()
    factor = feedback_factor(hessian)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ hessian, torch.eye(96), atol=1e-3, rtol=0)


@pytest.mark.parametrize("step", ["scale", "codebook", "descend"])
def test_no_refit_raises_the_error(spec, step):
    """Scales, codebook and codes may each be refitted at any time without loss."""
    if (step == "scale" and spec.rank) or (step == "codebook" and not spec.grid.is_learned):
        pytest.skip("this spec has none")
    refit = {
        "scale": refit_scale,
        "codebook": refit_codebook,
        "descend": descend,
    }[step]
    for seed in range(2):
        weight, hessian = random_layer(seed=seed)
        former = fit_weight(weight, spec, importance=hessian.diagonal(), num_rounds=1)
        for _ in range(2):
            fitted = refit(weight, former, hessian)
            before, after = (hessian_error(weight, q, hessian) for q in (former, fitted))
            assert after <= before * (1 + 1e-5)
            former = fitted


def test_refitted_scales_and_offsets_are_least_squares_together():
    """One system of 2G unknowns a row, to the float16 grid."""
    weight, hessian = random_layer(4, 48)
    weight += 0.1
    start = fit_weight(
        weight, make_spec(4, group_size=16, codebook="uint"), importance=hessian.diagonal()
    )
    fitted = refit_scale(weight, start, hessian)
    values = start.codebook[start.indices.int()]
    root = torch.linalg.cholesky(hessian).T
    for row in range(4):
        groups = [slice(16 * group, 16 * group + 16) for group in range(3)]
        columns = [root[:, group] @ values[row, group] for group in groups]
        columns += [root[:, group].sum(1) for group in groups]
        system = torch.stack(columns, 1)
        best = torch.linalg.lstsq(system, root @ weight[row]).solution
        found = torch.cat([fitted.scale[row], fitted.parts["offset"][row]])
        torch.testing.assert_close(found, best, rtol=5e-3, atol=5e-4)


@pytest.mark.parametrize("codebook", ["int", "uint", "balanced", "iq4_nl"])
def test_chunks_of_rows_change_nothing(monkeypatch, codebook):
    """A vocabulary that is fitted in parts gets what one fit gives, where codebooks are fixed."""
    weight, hessian = random_layer(20, 64)
    spec = make_spec(4, group_size=16, codebook=codebook)
    whole = fit_with_hessian(weight, spec, hessian)
    monkeypatch.setattr(hessian_fit, "FITTED_ROWS", 7)
    chunked = fit_with_hessian(weight, spec, hessian)
    assert chunked.parts.keys() == whole.parts.keys()
    # Products of other shapes sum in another order, which moves a code on a border now and then.
    assert (chunked.indices != whole.indices).float().mean() < 0.01
    ratio = hessian_error(weight, chunked, hessian) / hessian_error(weight, whole, hessian)
    assert ratio == pytest.approx(1, rel=1e-3)


def test_chunks_of_rows_share_a_learned_codebook(monkeypatch):
    """Fitted to rows spread over all; the whole is nearly as good as one fit."""
    weight, hessian = random_layer(40, 64)
    spec = make_spec(2, group_size=16)
    whole = fit_with_hessian(weight, spec, hessian)
    monkeypatch.setattr(hessian_fit, "FITTED_ROWS", 10)
    chunked = fit_with_hessian(weight, spec, hessian, row_weights=torch.rand(40) + 0.1)
    assert chunked.codebook.shape == (4,)
    assert chunked.indices.shape == (40, 64)
    assert hessian_error(weight, chunked, hessian) < 1.3 * hessian_error(weight, whole, hessian)


def test_refitted_scales_are_least_squares():
    """Without the float16 grid, no scale of a row can be moved to lower the error."""
    weight, hessian = random_layer(4, 48)
    spec = make_spec(bits=4, group_size=16)
    start = fit_weight(weight, spec, importance=hessian.diagonal())
    fitted = refit_scale(weight, start, hessian)
    values = start.codebook[start.indices.int()]
    for row in range(4):
        root = torch.linalg.cholesky(hessian).T  # E H E^T = |root E^T|^2
        columns = [
            root[:, group * 16 : (group + 1) * 16] @ values[row, group * 16 : (group + 1) * 16]
            for group in range(3)
        ]
        best = torch.linalg.lstsq(torch.stack(columns, 1), root @ weight[row]).solution
        torch.testing.assert_close(fitted.scale[row], best, rtol=2e-3, atol=0)


def test_powers_of_two_descend_to_where_no_single_one_is_better():
    """Each pass lowers the error; at its end neither twice nor half of any scale would."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 6, 12, generator=generator)
    normal, scale = root @ root.transpose(1, 2), torch.ones(5, 6)
    wanted = (normal @ torch.rand(5, 6, 1, generator=generator)).squeeze(-1)
    for _ in range(10):
        former, scale = scale, descend_scales(normal, wanted, scale, nearest_power)
        assert (change_in_error(normal, wanted, scale, former) <= 0).all()
    for group in range(6):
        for factor in (0.5, 2.0):
            other = scale.clone()
            other[:, group] *= factor
            assert (change_in_error(normal, wanted, other, scale) >= 0).all()


def test_every_fit_is_stored_as_it_is(spec):
    """Indices, scales and codebook survive the float16 grid; fixed codebooks stay fixed."""
    weight, hessian = random_layer()
    fitted = fit_with_hessian(weight, spec, hessian)
    numbers = fitted.parts.values()
    assert all(torch.equal(x, x.half().float()) for x in numbers)
    if spec.stored_dtype == "bfloat16":
        assert torch.equal(fitted.scale, fitted.scale.bfloat16().float())
    assert torch.equal(fitted.codebook, fitted.codebook.sort().values)
    assert fitted.indices.max() < 2**spec.bits
    if spec.grid.kind == "int":
        assert fitted.codebook.tolist() == list(range(-(2 ** (spec.bits - 1)), 0)) + list(
            range(2 ** (spec.bits - 1))
        )
    if spec.is_signed:
        assert (fitted.scale < 0).any(), "these codebooks reach further on one side"
        assert (fitted.scale > 0).any()
    elif not spec.rank:
        assert (fitted.scale > 0).all()


def test_a_weight_on_the_grid_comes_back_exactly():
    """What an integer grid holds already is its own best fit."""
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(-2, 2, (8, 64), generator=generator).float()
    indices[:, ::16], indices[:, 1::16] = -2, 1  # the whole range in each group
    signs = torch.tensor([1.0, -1.0]).repeat(4).unsqueeze(1)
    weight = indices * 0.0625 * signs
    _, hessian = random_layer(8, 64)
    fitted = fit_with_hessian(weight, SPECS["int 2"], hessian)
    assert torch.equal(fitted.dequantize(), weight)


@pytest.mark.recipe
def test_a_model_fitted_by_decoder_layers_is_a_student():
    """Every linear is replaced; nothing is left held."""
    model = TINY_MODELS["llama"]()
    plan = plan_of(model, "q2a4_g16")
    linears = dense_weights(model, plan)
    task = FitTask(
        specs=plan.quantized, weight_of=lambda name: linears[name].weight, row_weights={}
    )
    fit_by_decoder_layers(model, task, [torch.randint(0, 256, (4, 12))], dtype=torch.float32)
    layers = quantized_layers(model)
    assert list(layers) == list(linears)
    assert all(layer.held_weight is None for layer in layers.values())
    assert torch.isfinite(model(torch.randint(0, 256, (1, 8))).logits).all()


def test_a_singular_hessian_is_no_obstacle(spec):
    """Fewer tokens than inputs, silent inputs and inputs of zeros alone all give a finite fit."""
    weight, _ = random_layer()
    few = random_inputs(96, num_tokens=3)
    few[:, 10:30] = 0
    for hessian in (few.T @ few, torch.zeros(96, 96)):
        fitted = fit_with_hessian(weight, spec, hessian, target=weight)
        assert torch.isfinite(fitted.dequantize()).all()
        assert hessian_error(weight, fitted, dampen(hessian)) < 0.5


def test_rows_of_zeros_and_constant_weights_fit(spec):
    """A row of zeros comes back small, a constant weight nearly exactly."""
    weight, hessian = random_layer()
    weight[3] = 0
    fitted = fit_with_hessian(weight, spec, hessian)
    assert fitted.dequantize()[3].abs().max() < 2e-3
    constant = torch.full_like(weight, 0.25)
    fitted = fit_with_hessian(constant, spec, hessian)
    assert hessian_error(constant, fitted, hessian) < 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    """A weight or a statistic with NaN or infinity is an error that says what to do."""
    weight, hessian = random_layer()
    spec = SPECS["learned 2"]
    broken = weight.clone()
    broken[0, 0] = bad
    with pytest.raises(ValueError, match="repair the model"):
        fit_with_hessian(broken, spec, hessian)
    broken = hessian.clone()
    broken[0, 0] = bad
    with pytest.raises(ValueError, match="calibrate on this model"):
        fit_with_hessian(weight, spec, broken)


def test_statistics_of_another_layer_are_refused():
    """H must have one row per input of the weight."""
    weight, hessian = random_layer()
    with pytest.raises(ValueError, match=r"\(95, 95\).*\(96, 96\)"):
        fit_with_hessian(weight, SPECS["int 2"], hessian[1:, 1:])


@pytest.mark.parametrize(("on_grid", "num_rows"), [(True, [100, 25, 100]), (False, [100, 25])])
def test_a_weight_on_the_grid_stays_although_inputs_drift(on_grid, num_rows, monkeypatch):
    """Where the weight itself is the better answer to what earlier layers did, codes are kept.

    Of other weights only a sample of rows is tried.
    """
    fitted = []

    def fit(weight, *args, **options):
        fitted.append(len(weight))
        return fit_weight(weight, *args, **options)

    monkeypatch.setattr("qat.quant.hessian.fit_weight", fit)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator)
    fed = x + (0.02 if on_grid else 0.5) * torch.randn(512, 64, generator=generator)
    codes = torch.randint(0, 16, (100, 64), generator=generator).float()
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight = codes * 0.25 - 1.5
    if not on_grid:
        weight = torch.randn(100, 64, generator=generator)
    moments = Moments(hessian=fed.T @ fed / 512, drift=(x - fed).T @ fed / 512)
    wanted = wanted_weight(weight, moments, Correction(ridge=0.1, share=1.0))
    found = fit_with_hessian(
        weight, TensorSpec.from_name("gguf:q4_1"), moments.hessian, target=wanted
    )
    assert fitted == num_rows
    if on_grid:
        assert torch.equal(found.indices, codes.to(torch.uint8))
        assert (found.dequantize() - weight).abs().max() < 0.05  # scales move a fifth of a step
