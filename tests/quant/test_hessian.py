"""Laws of the fit against H, on random layers whose inputs are correlated."""

import pytest
import torch

from qat.calibrate.statistics import collect_loss_weights, walk_blocks
from qat.model.surgery import quantizable_linears, quantized_layers
from qat.pipelines.fit_layers import fit_by_blocks
from qat.quant.fit import fit_weight
from qat.quant.hessian import (
    corrected_target,
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
from qat.quant.scheme import LayerScheme, scheme_from_name
from tests.tiny import TINY_MODELS, tiny_llama

SCHEMES = {
    "learned 2": LayerScheme(bits=2, group_size=16),
    "learned 4": LayerScheme(bits=4, group_size=16),
    "int 2": LayerScheme(bits=2, group_size=16, codebook="int"),
    "int 4": LayerScheme(bits=4, group_size=16, codebook="int", stored_dtype="bfloat16"),
    "balanced": LayerScheme(bits=2, group_size=16, codebook="balanced"),
    "row scale": LayerScheme(bits=2, group_size=0),
    "low rank": LayerScheme(bits=2, rank=4),
}


@pytest.fixture(params=SCHEMES)
def scheme(request) -> LayerScheme:
    return SCHEMES[request.param]


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


def test_error_feedback_beats_plain_rounding(scheme):
    """Feeding errors forward lowers tr(E H E^T), on every draw, against rounding by moments."""
    for seed in range(4):
        weight, hessian = random_layer(seed=seed)
        plain = fit_weight(weight, scheme, importance=hessian.diagonal())
        fed = feed_errors(weight, plain, hessian)
        assert hessian_error(weight, fed, hessian) < hessian_error(weight, plain, hessian)


def test_error_feedback_equals_elimination_one_column_at_a_time():
    """The blocked triangular form is the plain loop that inverts H again after each column."""
    weight, hessian = random_layer(6, 80, seed=3)
    start = fit_weight(weight, SCHEMES["learned 2"], importance=hessian.diagonal())
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
def test_no_refit_raises_the_error(scheme, step):
    """Scales, codebook and codes may each be refitted at any time without loss."""
    if (step == "scale" and scheme.rank) or (step == "codebook" and scheme.codebook != "learned"):
        pytest.skip("this scheme has none")
    refit = {
        "scale": lambda w, q, h: refit_scale(w, q, h, scheme),
        "codebook": refit_codebook,
        "descend": descend,
    }[step]
    for seed in range(3):
        weight, hessian = random_layer(seed=seed)
        former = fit_weight(weight, scheme, importance=hessian.diagonal())
        for _ in range(3):
            fitted = refit(weight, former, hessian)
            before, after = (hessian_error(weight, q, hessian) for q in (former, fitted))
            assert after <= before * (1 + 1e-5)
            former = fitted


def test_refitted_scales_are_least_squares():
    """Without the float16 grid, no scale of a row can be moved to lower the error."""
    weight, hessian = random_layer(4, 48)
    scheme = LayerScheme(bits=4, group_size=16)
    start = fit_weight(weight, scheme, importance=hessian.diagonal())
    fitted = refit_scale(weight, start, hessian, scheme)
    values = start.codebook[start.indices.int()]
    for row in range(4):
        root = torch.linalg.cholesky(hessian).T  # E H E^T = |root E^T|^2
        columns = [
            root[:, group * 16 : (group + 1) * 16] @ values[row, group * 16 : (group + 1) * 16]
            for group in range(3)
        ]
        best = torch.linalg.lstsq(torch.stack(columns, 1), root @ weight[row]).solution
        torch.testing.assert_close(fitted.scale[row], best, rtol=2e-3, atol=0)


def test_every_fit_is_stored_as_it_is(scheme):
    """Indices, scales and codebook survive the float16 grid; fixed codebooks stay fixed."""
    weight, hessian = random_layer()
    fitted = fit_with_hessian(weight, scheme, hessian)
    numbers = [fitted.codebook, *(fitted.low_rank or [fitted.scale])]
    assert all(torch.equal(x, x.half().float()) for x in numbers)
    if scheme.stored_dtype == "bfloat16":
        assert torch.equal(fitted.scale, fitted.scale.bfloat16().float())
    assert torch.equal(fitted.codebook, fitted.codebook.sort().values)
    assert fitted.indices.max() < 2**scheme.bits
    if scheme.codebook == "int":
        assert fitted.codebook.tolist() == list(range(-(2 ** (scheme.bits - 1)), 0)) + list(
            range(2 ** (scheme.bits - 1))
        )
    if scheme.is_signed:
        assert (fitted.scale < 0).any(), "these codebooks reach further on one side"
        assert (fitted.scale > 0).any()
    elif not scheme.rank:
        assert (fitted.scale > 0).all()


def test_a_weight_on_the_grid_comes_back_exactly():
    """What an integer grid holds already is its own best fit."""
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(-2, 2, (8, 64), generator=generator).float()
    indices[:, ::16], indices[:, 1::16] = -2, 1  # the whole range in each group
    signs = torch.tensor([1.0, -1.0]).repeat(4).unsqueeze(1)
    weight = indices * 0.0625 * signs
    _, hessian = random_layer(8, 64)
    fitted = fit_with_hessian(weight, SCHEMES["int 2"], hessian)
    assert torch.equal(fitted.dequantize(), weight)


def test_the_target_makes_the_most_of_the_quantized_inputs():
    """W* is the ridge regression of W x on x_q, drawn to W."""
    x = random_inputs(32).double()
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(*x.shape, dtype=torch.float64, generator=generator)
    fed = x + 0.3 * noise * x.std(0)
    weight, _ = random_layer(4, 32)
    hessian, cross = fed.T @ fed / len(x), x.T @ fed / len(x)
    target = corrected_target(weight, hessian.float(), (cross - hessian).float())
    ridge = (
        hessian.diagonal().mean() * (dampen(hessian) - hessian / hessian.diagonal().mean())[0, 0]
    )
    normal = hessian + ridge * torch.eye(32)
    expected = torch.linalg.solve(normal, (weight.double() @ (cross + ridge * torch.eye(32))).T).T
    torch.testing.assert_close(target.double(), expected, atol=1e-4, rtol=1e-3)
    unmoved = corrected_target(weight, hessian.float(), torch.zeros(32, 32))
    torch.testing.assert_close(unmoved, weight)


@pytest.mark.parametrize("family", TINY_MODELS)
def test_statistics_are_those_of_the_inputs_really_fed(family):
    """mean x_q x_q^T and mean (x - x_q) x_q^T, with x_q behind all layers replaced so far."""
    model, dense = TINY_MODELS[family](), TINY_MODELS[family]()
    batches = list(torch.randint(0, 256, (6, 12)).split(4))
    names = list(quantizable_linears(model, scheme_from_name("q2a4")))
    found = {}
    for group, statistics in walk_blocks(model, names, batches):
        for name in group:
            found[name] = statistics
            weight = model.get_submodule(name).weight
            weight.data = (weight.data * 8).round() / 8
    assert list(found) == names
    inputs, dense_inputs = inputs_of(model, names, batches), inputs_of(dense, names, batches)
    for name, statistics in found.items():
        x, wanted = inputs[name], dense_inputs[name]
        torch.testing.assert_close(statistics.hessian, x.T @ x / len(x), atol=1e-4, rtol=1e-3)
        drift = (wanted - x).T @ x / len(x)
        torch.testing.assert_close(statistics.drift, drift, atol=1e-4, rtol=1e-3)


def test_weighted_statistics_count_each_token_by_its_weight():
    """sum w x x^T / sum w; linears of one input take the mean of their shares."""
    model, dense = tiny_llama(), tiny_llama()
    batches = list(torch.randint(0, 256, (6, 12)).split(4))
    names = list(quantizable_linears(model, scheme_from_name("q2a4")))
    weights = {name: [torch.rand(batch.shape) for batch in batches] for name in names}
    inputs = inputs_of(dense, names, batches)
    for group, statistics in walk_blocks(model, names, batches, token_weights=weights):
        share = [torch.cat([batch.flatten() for batch in weights[name]]) for name in group]
        weight = sum(one / one.sum() for one in share) / len(share)
        x = inputs[group[0]]
        expected = (x * weight.unsqueeze(1)).T @ x
        torch.testing.assert_close(statistics.hessian, expected, atol=1e-5, rtol=1e-3)
        assert statistics.drift.abs().max() < 1e-5


def test_loss_weights_are_squared_gradients_of_drawn_tokens():
    """Mean over outputs of (d loss / d output)^2, by autograd on an output that is a leaf."""
    model = tiny_llama().requires_grad_(False)
    name, ids = "model.layers.1.mlp.up_proj", torch.randint(0, 256, (2, 6))
    found = collect_loss_weights(model, [name], [ids], seed=3)[name][0]
    linear, leaf = model.get_submodule(name), []

    def replace(_module, _inputs, output):
        leaf.append(output.detach().requires_grad_())
        return leaf[0]

    linear.register_forward_hook(replace)
    logits = model(ids).logits.flatten(0, 1)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
    loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf[0])
    torch.testing.assert_close(found, gradient.square().mean(-1))


def inputs_of(model, names, batches) -> dict[str, torch.Tensor]:
    """Return every linear's inputs, (tokens, I), from plain whole forward passes."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: seen[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_a_model_fitted_by_blocks_is_a_student():
    """Every linear is replaced; nothing is left held."""
    model = TINY_MODELS["llama"]()
    scheme = scheme_from_name("q2a4_g16")
    linears = quantizable_linears(model, scheme)
    fit_by_blocks(
        model,
        {name: scheme.layer(name) for name in linears},
        [torch.randint(0, 256, (4, 12))],
        weight_of=lambda name: linears[name].weight,
        dtype=torch.float32,
    )
    layers = quantized_layers(model)
    assert list(layers) == list(linears)
    assert all(layer.held_weight is None for layer in layers.values())
    assert torch.isfinite(model(torch.randint(0, 256, (1, 8))).logits).all()


def test_a_singular_hessian_is_no_obstacle(scheme):
    """Fewer tokens than inputs, silent inputs and inputs of zeros alone all give a finite fit."""
    weight, _ = random_layer()
    few = random_inputs(96, num_tokens=3)
    few[:, 10:30] = 0
    for hessian in (few.T @ few, torch.zeros(96, 96)):
        fitted = fit_with_hessian(weight, scheme, hessian, drift=torch.zeros(96, 96))
        assert torch.isfinite(fitted.dequantize()).all()
        assert hessian_error(weight, fitted, dampen(hessian)) < 0.5


def test_rows_of_zeros_and_constant_weights_fit(scheme):
    """A row of zeros comes back small, a constant weight nearly exactly."""
    weight, hessian = random_layer()
    weight[3] = 0
    fitted = fit_with_hessian(weight, scheme, hessian)
    assert fitted.dequantize()[3].abs().max() < 2e-3
    constant = torch.full_like(weight, 0.25)
    fitted = fit_with_hessian(constant, scheme, hessian)
    assert hessian_error(constant, fitted, hessian) < 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    """A weight or a statistic with NaN or infinity is an error that says what to do."""
    weight, hessian = random_layer()
    scheme = SCHEMES["learned 2"]
    broken = weight.clone()
    broken[0, 0] = bad
    with pytest.raises(ValueError, match="repair the model"):
        fit_with_hessian(broken, scheme, hessian)
    broken = hessian.clone()
    broken[0, 0] = bad
    with pytest.raises(ValueError, match="calibrate on this model"):
        fit_with_hessian(weight, scheme, broken)


def test_statistics_of_another_layer_are_refused():
    """H must have one row per input of the weight."""
    weight, hessian = random_layer()
    with pytest.raises(ValueError, match=r"\(95, 95\).*\(96, 96\)"):
        fit_with_hessian(weight, SCHEMES["int 2"], hessian[1:, 1:])


def test_a_linear_outside_numbered_blocks_is_refused():
    """The walk needs blocks that follow each other; it says which fit does not."""
    model = TINY_MODELS["llama"]()
    with pytest.raises(ValueError, match="--fit moments"):
        next(walk_blocks(model, ["lm_head"], [torch.zeros(1, 4, dtype=torch.long)]))
    with pytest.raises(ValueError, match="no tokens"):
        next(walk_blocks(model, ["model.layers.0.mlp.up_proj"], []))
