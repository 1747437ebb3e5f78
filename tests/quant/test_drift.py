import torch

from qat.quant.drift import (
    Correction,
    Moments,
    choose_corrections,
    ridge_factor,
    solved,
    wanted_weight,
)


def inputs(num_tokens: int, noise: float, *, is_linear: bool, seed: int = 0):
    """Return x and x_q, (tokens, 24): x_q another linear map of x, or x with noise."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(24, 24, generator=torch.Generator().manual_seed(9))
    x = torch.randn(num_tokens, 24, generator=generator) @ mix
    if is_linear:
        return x, x + noise * x @ torch.randn(24, 24, generator=torch.Generator().manual_seed(8))
    return x, x + noise * torch.randn(num_tokens, 24, generator=generator)


def moments_of(x: torch.Tensor, fed: torch.Tensor) -> Moments:
    """Return the moments of inputs, (tokens, I)."""
    return Moments(hessian=fed.T @ fed / len(x), drift=(x - fed).T @ fed / len(x))


def output_error(weight, wanted, x, fed) -> float:
    """Return mean |W x - W* x_q|^2."""
    return float((x @ weight.T - fed @ wanted.T).square().sum(1).mean())


def chosen(weight, x, fed) -> Correction:
    """Return the correction chosen on two halves of the tokens."""
    half = len(x) // 2
    halves = (moments_of(x[:half], fed[:half]), moments_of(x[half:], fed[half:]))
    return choose_corrections([weight], halves)[0]


def test_the_wanted_weight_is_the_ridge_regression_drawn_to_the_weight():
    """argmin |W x - W* x_q|^2 + ridge |W - W*|^2, in float64 by its normal equations."""
    x, fed = inputs(300, 0.5, is_linear=False)
    weight, ridge = torch.randn(5, 24), 0.3
    moments = moments_of(x, fed)
    cross = (moments.drift + moments.hessian).double()
    identity = ridge * moments.hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    expected = torch.linalg.solve(
        moments.hessian.double() + identity, (weight.double() @ (cross + identity)).T
    ).T
    found = wanted_weight(weight, moments, Correction(ridge=ridge, share=1.0))
    torch.testing.assert_close(found[1:3], found[:][1:3])
    found = found[:]
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-3)


def test_a_drift_that_a_linear_map_undoes_is_undone():
    """Cross-validation takes the whole of a correction that holds on other tokens."""
    x, fed = inputs(2000, 0.1, is_linear=True)
    weight = torch.randn(16, 24)
    correction = chosen(weight, x, fed)
    assert correction.share > 0.9
    wanted = wanted_weight(weight, moments_of(x, fed), correction)[:]
    x, fed = inputs(2000, 0.1, is_linear=True, seed=1)
    assert output_error(weight, wanted, x, fed) < 0.1 * output_error(weight, weight, x, fed)


def test_another_output_may_be_wanted():
    """Such as what takes the residual stream to where it should be."""
    x, _ = inputs(2000, 0.0, is_linear=True)
    weight, wanted = torch.randn(16, 24), torch.randn(16, 24)
    moments = Moments(hessian=x.T @ x / len(x), wanted=(x @ wanted.T).T @ x / len(x))
    (correction,) = choose_corrections([weight], (moments, moments))
    found = wanted_weight(weight, moments, correction)[:]
    before = float((x @ (wanted - weight).T).square().mean())
    assert float((x @ (wanted - found).T).square().mean()) < 0.05 * before


def test_a_correction_that_few_tokens_suggest_is_not_taken():
    """With as many tokens as unknowns the plain regression is worse than nothing on other text."""
    x, fed = inputs(40, 0.5, is_linear=False)
    weight = torch.randn(16, 24)
    moments = moments_of(x, fed)
    careful = wanted_weight(weight, moments, chosen(weight, x, fed))
    careful = weight if careful is None else careful[:]
    bold = weight + solved(moments.aim(weight), *ridge_factor(moments.hessian, 0.01))
    x, fed = inputs(2000, 0.5, is_linear=False, seed=1)
    errors = [output_error(weight, one, x, fed) for one in (careful, bold, weight)]
    assert errors[0] < errors[1]
    assert errors[0] < 1.05 * errors[2]


def test_no_drift_and_silent_inputs_leave_the_weight():
    """Nothing to correct, nothing corrected."""
    weight, x = torch.randn(5, 24), torch.randn(50, 24)
    for fed in (x, torch.zeros_like(x)):
        assert wanted_weight(weight, moments_of(x, fed), chosen(weight, x, fed)) is None


def test_weights_that_read_one_input_are_looked_at_together():
    """Each gets what it gets alone."""
    x, fed = inputs(200, 0.3, is_linear=False)
    weights = [torch.randn(16, 24), torch.zeros(4, 24), torch.randn(300, 24)]
    halves = (moments_of(x[:100], fed[:100]), moments_of(x[100:], fed[100:]))
    together = choose_corrections(weights, halves)
    for weight, found in zip(weights, together, strict=True):
        (alone,) = choose_corrections([weight], halves)
        assert found.ridge == alone.ridge
        assert abs(found.share - alone.share) < 1e-5


def test_a_weight_with_two_uses_is_drawn_to_what_serves_both():
    """The least of errors from W* that count by H and from W that count by K, nearly."""
    x, fed = inputs(2000, 0.3, is_linear=True)
    generator = torch.Generator().manual_seed(3)
    weight, moments = torch.randn(16, 24, generator=generator), moments_of(x, fed)
    rows = torch.randn(500, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    kept, correction = rows.T @ rows / 500, Correction(ridge=0.01, share=1.0)
    wanted = wanted_weight(weight, moments, correction)[:]
    found = wanted_weight(weight, moments, correction, kept)
    torch.testing.assert_close(found[3:5], found[:][3:5])

    def cost(one):
        first, second = one - wanted, one - weight
        return float(((first @ moments.hessian) * first + (second @ kept) * second).sum())

    best = torch.linalg.solve(
        (moments.hessian + kept).T, (wanted @ moments.hessian + weight @ kept).T
    ).T
    assert cost(found[:]) < 1.05 * cost(best)
    assert cost(found[:]) < 0.9 * min(cost(wanted), cost(weight))
