"""The quantized linear layer: what training sees and what a file holds.

Shape legend: B batch, T tokens, O out, I in, G groups of a row, R rank, C codebook values.
"""

import torch
from torch import Tensor, nn

from qat.grids.scalar import low_rank_scale
from qat.quant.fit import QuantizedWeight
from qat.quant.scheme import LayerScheme
from qat.quant.straight_through import Dequantize, SnapBfloat16, SnapFloat16, fake_quantize

SNAPS = {"float16": SnapFloat16, "bfloat16": SnapBfloat16}


class FakeQuantLinear(nn.Module):
    """A linear layer whose weight lies on a grid; scales and codebook are float32 parameters.

    With a `latent_weight` the indices follow it (straight-through); without one they are frozen.
    `held_weight` is the weight formed once and shared by many forwards; see `surgery`.
    """

    def __init__(
        self, in_features: int, out_features: int, scheme: LayerScheme, *, has_bias: bool = False
    ):
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        if scheme.rank:
            self.scale_a = nn.Parameter(torch.empty(out_features, scheme.rank))
            self.magnitude = nn.Parameter(torch.empty(scheme.rank))
            self.scale_b = nn.Parameter(torch.empty(scheme.rank, in_features))
        else:
            self.scale = nn.Parameter(torch.empty(out_features, scheme.groups_of(in_features)))
        self.codebook = nn.Parameter(torch.empty(2**scheme.bits))
        self.bias = nn.Parameter(torch.empty(out_features)) if has_bias else None
        self.register_buffer(
            "indices", torch.empty(out_features, in_features, dtype=torch.uint8), persistent=True
        )
        self.register_parameter("latent_weight", None)
        self.held_weight: Tensor | None = None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, quantized: QuantizedWeight, scheme: LayerScheme
    ) -> "FakeQuantLinear":
        """Return the layer that holds a quantized weight and a linear's bias."""
        layer = cls(
            linear.in_features, linear.out_features, scheme, has_bias=linear.bias is not None
        )
        layer.bias = linear.bias
        layer.indices = quantized.indices
        layer.codebook.data = quantized.codebook
        if scheme.rank:
            for name, factor in quantized.low_rank._asdict().items():
                getattr(layer, name).data = factor.contiguous()
        else:
            layer.scale.data = quantized.scale
        return layer

    def stored(self, values: Tensor) -> Tensor:
        """Return scales or a codebook as a file holds them, straight through."""
        snap = SNAPS.get(self.scheme.stored_dtype)
        return values if snap is None else snap.apply(values)

    def full_scale(self) -> Tensor:
        """Return the scales as stored: (O, G), or (O, I) when low rank."""
        if self.scheme.rank:
            factors = (self.scale_a, self.magnitude, self.scale_b)
            scale = low_rank_scale(*(self.stored(factor) for factor in factors))
        else:
            scale = self.stored(self.scale)
        floor = self.scheme.scale_floor
        return scale if floor is None else scale.clamp_min(floor)

    def fake_quantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return W_hat, (O, I), with gradients to whatever trains."""
        scale, codebook = self.full_scale(), self.stored(self.codebook)
        if self.latent_weight is None:
            return Dequantize.apply(self.indices, scale, codebook, dtype)
        return fake_quantize(self.latent_weight, scale, codebook, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W_hat.T + bias for x of shape (..., I)."""
        weight = self.held_weight
        if weight is None:
            weight = self.fake_quantized_weight(x.dtype)
        return nn.functional.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        """Return the sizes and the scheme, for people."""
        scales = (
            f"rank={self.scheme.rank}" if self.scheme.rank else f"group={self.scheme.group_size}"
        )
        return f"{self.in_features}, {self.out_features}, bits={self.scheme.bits}, {scales}"
