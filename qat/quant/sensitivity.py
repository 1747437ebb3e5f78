"""What each format of a weight costs at the end of the model, before any is chosen.

    cost = 1/2 sum_o g_o e_o H e_o^T    nats per token, e = W_hat - W

with the second moment H of the inputs and g_o that of the gradient at output o. W_hat is fitted on
rows drawn in proportion to what they cost as zeros: relative errors of rows are much alike, costs
are not (one row may hold half of a weight's). Each format is fitted by second moments; how much
error feedback then gains depends on H far more than on the format, so it is measured for one of
each kind: of few bits, of more, of blocks.

Shape legend: O out, I in.

Source: Kronecker-factored Fisher, Martens and Grosse 2015, arXiv:1503.05671, with a diagonal factor
of outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.quant.fit import fit_weight
from qat.quant.hessian import dampen, fit_with_hessian
from qat.quant.quantized_tensor import QuantizedTensor
from qat.quant.spec import TensorSpec

SAMPLED_ROWS = 64  # of each weight that are drawn
FEWER = 4  # times fewer draws where a grid rounds several weights at once, which takes longer
COARSE_BITS = 3  # up to which rounding is coarse
NUM_ROUNDS = 1  # of the fit by second moments
NUM_SWEEPS = 1  # of the fit with error feedback


# Rows, format and H to rows on the grid.
Fit = Callable[[Tensor, TensorSpec, Tensor], QuantizedTensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightInfo:
    """A weight and how much errors of its outputs count."""

    weight: Tensor
    """(O, I)."""
    row_mass: Tensor
    """Second moment of the gradient at each output, (O,)."""


def error_cost(error: Tensor, row_mass: Tensor, hessian: Tensor) -> float:
    """Return the cost of an error in a weight, (O, I), in nats per token."""
    return float((row_errors(error, hessian.float()) * row_mass).sum()) / 2


def sample_rows(energy: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return rows, (R,), and how often each came in `count` draws, (R,); all once if no more.

    Args:
        energy: What each row costs as zeros, (O,): draws are evenly spaced along its running sum,
            the largest first.
        count: Draws.
    """
    order = energy.argsort(descending=True)
    if len(order) <= count:
        return order, torch.ones_like(energy)
    running = energy[order].cumsum(0)
    draws = (torch.arange(count, device=energy.device) + 0.5) / count * running[-1]
    places = torch.searchsorted(running, draws).clamp_max(len(order) - 1)
    places, times = places.unique(return_counts=True)
    return order[places], times.to(energy)


def format_costs(
    weights: Mapping[str, WeightInfo],
    specs: Sequence[TensorSpec],
    hessian: Tensor,
) -> dict[str, dict[str, float]]:
    """Return the cost of each format, in nats per token, by weight and name of the format.

    Args:
        weights: That read the same inputs, by name.
        specs: Formats; a dense one costs nothing.
        hessian: Second moment of the inputs, (I, I).
    """
    hessian = hessian.float()
    energies = {
        name: row_errors(info.weight.float(), hessian) * info.row_mass  # (O,)
        for name, info in weights.items()
    }
    totals = {name: float(energy.sum()) / 2 for name, energy in energies.items()}
    many, few = (draw_rows(weights, energies, n) for n in (SAMPLED_ROWS, SAMPLED_ROWS // FEWER))
    costs: dict[str, dict[str, float]] = {name: {} for name in weights}
    gains: dict[str, dict[str, float]] = {}
    for spec in specs:
        rows, mass = few if spec.is_vector else many
        ratios = error_ratios(rows, mass, spec, hessian, fit_by_moments)
        if spec.is_quantized and kind_of(spec) not in gains and min(ratios.values()) > 0:
            fed = error_ratios(rows, mass, spec, hessian, fit_with_feedback)
            gains[kind_of(spec)] = {name: min(1.0, fed[name] / ratios[name]) for name in fed}
        gain = gains.get(kind_of(spec), {}) if spec.is_quantized else {}
        for name, ratio in ratios.items():
            costs[name][spec.name] = ratio * gain.get(name, 1.0) * totals[name]
    return costs


def draw_rows(
    weights: Mapping[str, WeightInfo], energies: Mapping[str, Tensor], count: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return rows of each weight, (R, I), and how much their errors count, (R,), by name."""
    rows, masses = {}, {}
    for name, info in weights.items():
        chosen, times = sample_rows(energies[name], count)
        rows[name], masses[name] = info.weight[chosen].float(), info.row_mass[chosen]
        if len(info.weight) > count:  # drawn by their energy, so that relative errors count alike
            masses[name] = masses[name] * times / energies[name][chosen].clamp_min(1e-30)
    return rows, masses


def kind_of(spec: TensorSpec) -> str:
    """Return what decides how much error feedback gains."""
    if spec.is_vector:
        return "block"
    return "coarse" if spec.bits <= COARSE_BITS else "fine"


def row_errors(rows: Tensor, hessian: Tensor) -> Tensor:
    """Return e_o H e_o^T of each row, (O,)."""
    return ((rows @ hessian) * rows).sum(1).clamp_min(0)


def error_ratios(
    samples: Mapping[str, Tensor],
    masses: Mapping[str, Tensor],
    spec: TensorSpec,
    hessian: Tensor,
    fit: Fit,
) -> dict[str, float]:
    """Return the weighted error of each weight's sampled rows over that of zeros."""
    if not spec.is_quantized:
        return dict.fromkeys(samples, 0.0)
    if spec.grid.is_learned:  # a codebook of its own each
        fitted = {name: fit(rows, spec, hessian).dequantize() for name, rows in samples.items()}
    else:
        sizes = [len(rows) for rows in samples.values()]
        joint = fit(torch.cat(list(samples.values())), spec, hessian).dequantize()
        fitted = dict(zip(samples, joint.split(sizes), strict=True))
    ratios = {}
    for name, rows in samples.items():
        error = (row_errors(fitted[name] - rows, hessian) * masses[name]).sum()
        whole = (row_errors(rows, hessian) * masses[name]).sum()
        ratios[name] = float(error / whole.clamp_min(1e-30))
    return ratios


def fit_by_moments(rows: Tensor, spec: TensorSpec, hessian: Tensor) -> QuantizedTensor:
    """Return rows as a format holds them, (R, I), each weight counted by its input's power."""
    importance = dampen(hessian).diagonal()
    return fit_weight(rows, spec, importance=importance, num_rounds=NUM_ROUNDS)


def fit_with_feedback(rows: Tensor, spec: TensorSpec, hessian: Tensor) -> QuantizedTensor:
    """Return rows as a format holds them, (R, I), fitted against all of H."""
    return fit_with_hessian(rows, spec, hessian, num_sweeps=NUM_SWEEPS)
