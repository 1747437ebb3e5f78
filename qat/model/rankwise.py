"""The rank-by-rank forward: what the Neural Engine computes, and what training never does.

With low-rank scales S = (A * g) @ B, unit columns or not, and codebook values Q = C[indices],

    y = sum_k g_k a_k * (Q @ (b_k * x))        one matmul per rank, R times the multiplications

equals (Q * S) @ x, one matmul. The first form is kept as the reference of tests, as what the
benchmark compares with, and because any group scales are low-rank ones too: A holds the scales,
row k of B is one on group k and zero elsewhere.

Shape legend: O out, I in, G groups of a row, R rank.
"""

import torch
from torch import Tensor, nn

from qat.grids.scalar import snap_float16
from qat.grids.scales import LowRank
from qat.model.layers import FakeQuantLinear


class RankwiseLinear(nn.Module):
    """The layer that a quantized layer is, evaluated one rank at a time; parameters are shared.

    Indices are frozen: their codebook values are held as floats, like the seeds' layer does.
    """

    def __init__(self, layer: FakeQuantLinear):
        """Take over the factors of a layer that does not floor its scales."""
        super().__init__()
        if layer.spec.floor is not None:
            raise ValueError(
                "a layer of the seeds' first form floors its scales, which no sum over ranks does; "
                "run `qat convert-v1-to-v2` first"
            )
        factors = low_rank_factors(layer)
        self.scale_a = as_parameter(factors.scale_a)
        self.magnitude = as_parameter(factors.magnitude)
        self.scale_b = as_parameter(factors.scale_b)
        self.bias = layer.bias
        self.stored = layer.stored
        with torch.no_grad():
            values = layer.stored(layer.codebook)[layer.indices.int()]
        self.register_buffer("values", values, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for x of shape (..., I)."""
        values = self.values.to(x.dtype)
        scale_a, magnitude, scale_b = (
            self.stored(factor) for factor in (self.scale_a, self.magnitude, self.scale_b)
        )
        output = None
        for rank in range(len(magnitude)):
            column = (magnitude[rank] * scale_a[:, rank]).to(x.dtype)
            term = column * nn.functional.linear(x * scale_b[rank].to(x.dtype), values)
            output = term if output is None else output + term
        return output if self.bias is None else output + self.bias


def as_parameter(factor: Tensor) -> nn.Parameter:
    """Return a factor as a parameter, itself where it is one."""
    return factor if isinstance(factor, nn.Parameter) else nn.Parameter(factor)


def low_rank_factors(layer: FakeQuantLinear) -> LowRank:
    """Return the factors of a layer's scales; group scales are written as such exactly."""
    if layer.spec.rank:
        return LowRank(layer.scale_a, layer.magnitude, layer.scale_b)
    num_groups = layer.scale.shape[1]
    members = group_members(num_groups, layer.in_features).to(layer.scale.device)
    return LowRank(layer.scale.detach().clone(), torch.ones(num_groups), members)


def group_members(num_groups: int, num_inputs: int) -> Tensor:
    """Return the (G, I) table that is one where an input belongs to a group."""
    return torch.eye(num_groups).repeat_interleave(num_inputs // num_groups, dim=1)


def as_group_scales(factors: LowRank) -> Tensor | None:
    """Return the group scales, (O, G), that factors were made of; None where they were not."""
    used = (factors.magnitude != 0) & (factors.scale_b != 0).any(dim=1)
    scale_a, magnitude, scale_b = (
        factors.scale_a[:, used],
        factors.magnitude[used],
        factors.scale_b[used],
    )
    num_groups, num_inputs = scale_b.shape
    if not num_groups or num_inputs % num_groups or not (magnitude == 1).all():
        return None
    return scale_a if torch.equal(scale_b, group_members(num_groups, num_inputs)) else None


def widen(factors: LowRank, rank: int) -> LowRank:
    """Return factors of a larger rank and the same product.

    Added ranks have magnitude zero and fixed directions of length one, on the float16 grid, so that
    their magnitudes can train.
    """
    missing = rank - len(factors.magnitude)
    if missing <= 0:
        return factors
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(len(factors.scale_a), missing, generator=generator)
    rows = torch.randn(missing, factors.scale_b.shape[1], generator=generator)
    return LowRank(
        torch.cat([factors.scale_a, snap_float16(columns / columns.norm(dim=0))], dim=1),
        torch.cat([factors.magnitude, torch.zeros(missing)]),
        torch.cat([factors.scale_b, snap_float16(rows / rows.norm(dim=1, keepdim=True))]),
    )
