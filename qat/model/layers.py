"""Quantized layers: what training sees and what a file holds.

Shape legend: B batch, T tokens, O out, I in, G groups of a row, R rank, C codebook values.
For an embedding, O is the vocabulary and I the hidden size.
"""

import torch
from torch import Tensor, nn

from qat.quant.quantized_tensor import QuantizedTensor
from qat.quant.spec import TensorSpec
from qat.quant.straight_through import (
    Dequantize,
    SnapBfloat16,
    SnapFloat16,
    fake_quantize,
    scale_values,
)

SNAPS = {"float16": SnapFloat16, "bfloat16": SnapBfloat16}


class FakeQuantWeight(nn.Module):
    """A weight that lies on a grid; scales and codebook are float32 parameters.

    With a `latent_weight` the indices follow it (straight-through); without one they are frozen.
    `held_weight` is the weight formed once and shared by many forwards; see `surgery`.
    `held_values` are the grid values of indices that no step changes, looked up once.
    `rows` are those that this process has of all but the held weight and what serves all rows,
    None = all; see `sharding`.
    """

    def __init__(self, out_features: int, in_features: int, spec: TensorSpec):
        super().__init__()
        self.out_features, self.in_features, self.spec = out_features, in_features, spec
        shape = (out_features, in_features)
        for name, part_shape in spec.part_shapes(shape).items():
            self.register_parameter(name, nn.Parameter(torch.empty(part_shape)))
        if not spec.grid.num_values:
            self.register_parameter("codebook", None)
        indices = torch.empty(spec.grid.index_shape(shape), dtype=spec.grid.index_dtype)
        self.register_buffer("indices", indices, persistent=True)
        self.register_parameter("latent_weight", None)
        self.held_weight: Tensor | None = None
        self.held_values: Tensor | None = None
        self.rows: slice | None = None

    @property
    def parts(self) -> dict[str, nn.Parameter]:
        """Scales and codebook by name."""
        names = self.spec.part_shapes((self.out_features, self.in_features))
        return {name: getattr(self, name) for name in names}

    @property
    def weight(self) -> Tensor:
        """The weight of the next forward, (O, I): the held one, or else formed in float32."""
        return self.fake_quantized_weight() if self.held_weight is None else self.held_weight

    def take(self, quantized: QuantizedTensor) -> None:
        """Hold a quantized tensor of this layer's spec."""
        self.indices = quantized.indices
        for name, values in quantized.parts.items():
            getattr(self, name).data = values.contiguous()

    def stored(self, values: Tensor) -> Tensor:
        """Return scales or a codebook as a file holds them, straight through."""
        snap = SNAPS.get(self.spec.stored_dtype)
        return values if snap is None else snap.apply(values)

    def stored_codebook(self) -> Tensor | None:
        """Return the codebook as a file holds it; None where the grid has none."""
        return None if self.codebook is None else self.stored(self.codebook)

    def expand(self) -> tuple[Tensor, Tensor | None]:
        """Return scales and offsets as stored: (O, G), or (O, I) when low rank."""
        return self.spec.scale.expand(self.parts, self.stored)

    def full_scale(self) -> Tensor:
        """Return the scales as stored: (O, G), or (O, I) when low rank."""
        return self.expand()[0]

    def fake_quantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return W_hat, (O, I), with gradients to whatever trains."""
        scale, offset = self.expand()
        codebook, grid = self.stored_codebook(), self.spec.grid
        if self.held_values is not None and not torch.is_grad_enabled():
            values = self.held_values
            return scale_values(
                lambda rows: values[rows].float(), values.shape, scale, offset, dtype
            )
        if self.latent_weight is None:
            return Dequantize.apply(self.indices, scale, offset, codebook, grid, dtype)
        return fake_quantize(self.latent_weight, scale, codebook, grid, dtype, offset=offset)

    def extra_repr(self) -> str:
        """Return the sizes and the format, for people."""
        return f"{self.in_features}, {self.out_features}, {self.spec.name}"


class FakeQuantLinear(FakeQuantWeight):
    """A linear layer whose weight lies on a grid."""

    def __init__(
        self, in_features: int, out_features: int, spec: TensorSpec, *, has_bias: bool = False
    ):
        super().__init__(out_features, in_features, spec)
        self.bias = nn.Parameter(torch.empty(out_features)) if has_bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, quantized: QuantizedTensor) -> "FakeQuantLinear":
        """Return the layer that holds a quantized weight and a linear's bias."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            quantized.spec,
            has_bias=linear.bias is not None,
        )
        layer.bias = linear.bias
        layer.take(quantized)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W_hat.T + bias for x of shape (..., I)."""
        weight = self.held_weight
        if weight is None:
            weight = self.fake_quantized_weight(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


class FakeQuantEmbedding(FakeQuantWeight):
    """An embedding whose table lies on a grid; a tied head computes with the same object."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        spec: TensorSpec,
        *,
        dtype: torch.dtype = torch.float32,
        embed_scale: float | Tensor | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, spec)
        self.dtype = dtype
        # Gemma multiplies what it looks up.
        scale = None if embed_scale is None else torch.as_tensor(embed_scale).detach().clone()
        self.register_buffer("embed_scale", scale, persistent=False)

    @classmethod
    def from_embedding(
        cls, embedding: "nn.Embedding | FakeQuantEmbedding", quantized: QuantizedTensor
    ) -> "FakeQuantEmbedding":
        """Return the layer that holds a quantized table in an embedding's place."""
        layer = empty_embedding(embedding, quantized.spec)
        layer.take(quantized)
        return layer

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the rows of token ids (B, T), (B, T, I), in the compute dtype."""
        weight = self.held_weight
        if weight is None:
            weight = self.fake_quantized_weight(self.dtype)
        rows = nn.functional.embedding(token_ids, weight)
        if self.embed_scale is None:
            return rows
        return rows * self.embed_scale.to(rows.dtype)


class TiedHead(nn.Module):
    """A head that multiplies with its model's quantized embedding; it has no parameters."""

    def __init__(self, embedding: FakeQuantEmbedding):
        super().__init__()
        self.tied = (embedding,)  # in a tuple, so that its parameters are not registered twice
        self.bias = None

    @property
    def weight(self) -> Tensor:
        """The weight of the next forward, (V, H)."""
        return self.tied[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W_hat.T for hidden states x of shape (..., H)."""
        (embedding,) = self.tied
        weight = embedding.held_weight
        if weight is None:
            weight = embedding.fake_quantized_weight(x.dtype)
        return nn.functional.linear(x, weight)


def empty_linear(linear: nn.Linear, spec: TensorSpec) -> FakeQuantLinear:
    """Return a layer of a linear's sizes whose values come later, from a file."""
    return FakeQuantLinear(
        linear.in_features, linear.out_features, spec, has_bias=linear.bias is not None
    )


def empty_embedding(
    embedding: nn.Embedding | FakeQuantEmbedding, spec: TensorSpec
) -> FakeQuantEmbedding:
    """Return a layer of an embedding's sizes whose values come later."""
    scale = getattr(embedding, "embed_scale", None)
    if isinstance(embedding, nn.Embedding):
        sizes, dtype = embedding.weight.shape, embedding.weight.dtype
    else:
        sizes, dtype = (embedding.out_features, embedding.in_features), embedding.dtype
    return FakeQuantEmbedding(*sizes, spec, dtype=dtype, embed_scale=scale)
