"""Outputs fitted in turns: what rounding some of them costs is made up for by those to come.

An error E in a weight costs the model

    1/2 tr(G E H E^T),    G = mean g g^T,    H = mean x x^T

nats, with the gradient g at the outputs and the inputs x, taken for independent. Error feedback
along the inputs looks at H alone and takes outputs for unrelated; queries and keys are far from it.
With G = L D L^T the cost is a sum over outputs, sum_o D_o e_o H e_o^T of e = L^T E: each output's
row is fitted to what the errors of those before it leave to be wanted. Rows of a turn are fitted
at once and take each other for unrelated: eight turns gain nearly what one for each row does. Each
takes a loop over the inputs, so where there are more of these than outputs four have to do.

Shape legend: O out, I in.

Source: two-sided rounding of YAQA, Tseng et al. 2025, arXiv:2505.22988.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qat.quant.hessian import feedback_factor
from qat.quant.quantized_tensor import QuantizedTensor

NUM_TURNS, FEW_TURNS = 8, 4
DAMPING = 1.0  # of the mean diagonal of G, which is known from few tokens
# Of the cost, at most, that turns by one half of a text leave by G of the other half. In SmolLM2 on
# 12,288 tokens 0.15 to 0.45 of queries, 0.8 to 0.95 of `o_proj` and `down_proj`, and 0.9 to 1.05 of
# `gate_proj`, whose turns then gain nothing on other text.
PAYING_RATIO = 0.95

# Rows, (O, I), and what is wanted of them, (O, I) float32, to rows on the grid.
FitRows = Callable[[Tensor, Tensor], QuantizedTensor]


class Outputs:
    """Rows of a weight that count together, in the order of their turns."""

    def __init__(self, weight: Tensor, target: Tensor, gram: Tensor):
        """Take rows, (O, I), what is wanted of them, and G, (O, O): the loudest come first."""
        self.order, self.factor = ordered_factor(gram.to(weight.device))
        self.weight, self.work = weight[self.order], target[self.order].float()

    def span(self, turn: int, num_turns: int) -> slice:
        """Return the places of a turn's rows."""
        count = len(self.order)
        return slice(count * turn // num_turns, count * (turn + 1) // num_turns)

    def feed(self, span: slice, error: Tensor) -> None:
        """Ask rows to come to make up for an error, wanted less fitted, of a span's."""
        pivots = self.factor[span, span].T
        scaled = torch.linalg.solve_triangular(pivots, error, upper=False)
        self.work[span.stop :].addmm_(self.factor[span, span.stop :].T, scaled, alpha=-1)


def ordered_factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs by falling G, (R,), and the feedback factor of G in that order, (R, R)."""
    gram = gram.float()
    mean = gram.diagonal().mean().clamp_min(1e-30)
    gram = gram / mean + DAMPING * torch.eye(len(gram), device=gram.device)
    order = gram.diagonal().argsort(descending=True, stable=True)
    return order, feedback_factor(gram[order][:, order])


def cost_after_turns(gram: Tensor, other: Tensor) -> Tensor:
    """Return what turns by one G leave of the cost tr(other) of errors of size one, a scalar.

    Args:
        gram: Sums or means of g g^T on one text, (R, R).
        other: On another, (R, R).
    """
    order, factor = ordered_factor(gram)
    fed = factor / factor.diagonal().unsqueeze(1)  # errors of a row and what it feeds to others
    return ((fed @ other[order][:, order]) * fed).sum()


def do_turns_pay(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Return whether turns by G of one half of a text lower the cost by the other half's.

    Args:
        first: G of runs of a linear's outputs, (R, R) each; sums do as well.
        second: Of the other half.
    """
    pairs = [*zip(first, second, strict=True), *zip(second, first, strict=True)]
    left = sum(cost_after_turns(*pair) for pair in pairs)
    return bool(left < PAYING_RATIO * sum(other.trace() for _, other in pairs))


def fit_in_turns(
    weights: Sequence[Tensor], targets: Sequence[Tensor], grams: Sequence[Tensor], fit: FitRows
) -> QuantizedTensor:
    """Return weights of one format that read the same inputs, fitted turn by turn, as one.

    Args:
        weights: (O, I) each.
        targets: What is wanted of each, (O, I).
        grams: G of each, (O, O).
        fit: Fits a turn's rows of all weights.
    """
    parts = [Outputs(*one) for one in zip(weights, targets, grams, strict=True)]
    num_rows, num_inputs = sum(map(len, weights)), weights[0].shape[1]
    num_turns = min(NUM_TURNS if num_rows >= num_inputs else FEW_TURNS, max(map(len, weights)))
    starts = torch.tensor([0, *map(len, weights)]).cumsum(0).tolist()
    fitted, places = [], []
    for turn in range(num_turns):
        spans = [(part, part.span(turn, num_turns)) for part in parts]
        wanted = torch.cat([part.work[span] for part, span in spans])
        rows = [part.weight[span] for part, span in spans]
        fitted.append(fit(torch.cat(rows), wanted))
        errors = (wanted - fitted[-1].dequantize()).split(list(map(len, rows)))
        for (part, span), error, start in zip(spans, errors, starts, strict=False):
            part.feed(span, error)
            places.append(start + part.order[span])
    return QuantizedTensor.join(fitted).rows(torch.cat(places).argsort())
