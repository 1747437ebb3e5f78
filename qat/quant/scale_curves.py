"""Super-scales and integers of vector grids from curves: what each sub-block gains by each scale.

The gain of a scale is what the best points under it take off sum h w^2. It is sampled at scales in
equal ratios; between samples a curve is the mean of the parabolas through three neighbours. For
each of several super-scales every sub-block takes the integer of most gain, and each super-block
the super-scale under which its sub-blocks gain most together.

Shape legend: O out, I in, S sub-blocks of a row, B super-blocks of a row, K samples, N integers.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qat.grids.scalar import over_scale
from qat.grids.super_blocks import stored_super
from qat.quant.spec import TensorSpec
from qat.quant.straight_through import row_chunks

NUM_SAMPLES = 30  # for IQ3_S and steep importances 20 leave 2% more error, 60 take off 1% more
FEWER_SAMPLES = 10  # of a start for error feedback, whose end is at most 1% worse for it
# Places of the largest sub-scale of a super-block, as shares of the range.
TOP_SHARES = tuple(1.15 * 0.96**step for step in range(24))


class Curves(NamedTuple):
    """Gains of each sub-block at scales in equal ratios."""

    first: Tensor  # log of the least scale, (O, S)
    step: float  # of the log
    gains: Tensor  # (O, S, K)

    def at(self, log_scale: Tensor) -> Tensor:
        """Return the gains at logs of scales, (O, S, N).

        A gain falls with the scale below the samples, and faster above them.
        """
        place = (log_scale - self.first.unsqueeze(-1)) / self.step
        last = self.gains.shape[-1] - 1
        left = place.floor().clamp(0, last - 1)
        beyond, left = place - left, left.long()
        share = beyond.clamp(0, 1)
        low, high = (self.gains.gather(-1, left + move) for move in (0, 1))
        before = self.gains.gather(-1, (left - 1).clamp_min(0))
        after = self.gains.gather(-1, (left + 2).clamp_max(last))
        bend = (before - low - high + after) / 4
        inside = low + share * (high - low) - share * (1 - share) * bend
        past = (self.step * (beyond - share)).exp()
        return torch.where(beyond < 0, inside * past, inside - (past - 1) * high.abs())


def sub_block_gains(weight: Tensor, scale: Tensor, spec: TensorSpec, importance: Tensor) -> Tensor:
    """Return the gain of each sub-block's scale, (O, S)."""
    scores = spec.grid.best_scores(over_scale(weight, scale), importance)
    return scores.view(*scale.shape, -1).sum(-1) * scale.square()


def sample_curves(
    weight: Tensor, spec: TensorSpec, importance: Tensor, num_samples: int = NUM_SAMPLES
) -> Curves:
    """Return the curves of a weight."""
    grouped = weight.view(len(weight), -1, spec.scale.sub_block)
    mass = importance.view(1, -1, spec.scale.sub_block)
    size = ((grouped.square() * mass).sum(-1) / mass.sum(-1)).sqrt().clamp_min(1e-10)
    low, high = spec.grid.table.ratios
    step = math.log(high / low) / (num_samples - 1)
    samples = [
        sub_block_gains(weight, size * (math.exp(step * place) / high), spec, importance)
        for place in range(num_samples)
    ]
    return Curves((size / high).log(), step, torch.stack(samples, dim=-1))


def search_parts(
    weight: Tensor, spec: TensorSpec, importance: Tensor, num_samples: int = NUM_SAMPLES
) -> dict[str, Tensor]:
    """Return super-scales and integers of least error by the curves of a weight (O, I)."""
    chunks = [
        search_rows(weight[rows], spec, importance, num_samples) for rows in row_chunks(weight)
    ]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def search_rows(
    weight: Tensor, spec: TensorSpec, importance: Tensor, num_samples: int
) -> dict[str, Tensor]:
    """Return what `search_parts` does, for rows whose curves fit memory together."""
    form, curves = spec.scale, sample_curves(weight, spec, importance, num_samples)
    per_super = form.super_block // form.sub_block
    best = curves.first + curves.step * curves.gains.argmax(-1)
    largest = best.view(len(weight), -1, per_super).amax(-1).exp()  # (O, B)
    units = (torch.arange(form.top + 1, device=weight.device) + form.shift) * form.factor  # (N,)
    parts = most = None
    for share in TOP_SHARES:
        super_scale = stored_super(largest / ((share * form.top + form.shift) * form.factor))
        full = super_scale.repeat_interleave(per_super, dim=1)
        gain, integer = curves.at(full.unsqueeze(-1).log() + units.log()).max(-1)
        total = gain.view(*super_scale.shape, per_super).sum(-1)
        if parts is None:
            parts, most = (super_scale, integer), total
            continue
        is_better = total > most
        every = is_better.repeat_interleave(per_super, dim=1)
        parts = super_scale.where(is_better, parts[0]), integer.where(every, parts[1])
        most = torch.maximum(total, most)
    return {"super_scale": parts[0], "sub_scale": parts[1].float()}
