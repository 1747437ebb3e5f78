"""Schemes: how each kind of layer is quantized, by name.

A name reads MLP bits, then attention bits: `q2a4` keeps MLP weights at 2 bits and attention weights
at 4 (A never means activations). `_gN` sets weights per scale, `_rN` takes low-rank scales of
rank N instead: `q2a4_g64`, `q4a4_r32`. `q4_r32` is short for `q4a4_r32`.
"""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

SCALE_BITS = 16  # scales and codebooks ship as float16
DEFAULT_GROUP_SIZE = 32

LayerKind = Literal["mlp", "attention"]
CodebookKind = Literal["learned", "uniform", "balanced", "int"]

MLP_NAMES = ("gate_proj", "up_proj", "down_proj")
ATTENTION_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")

_NAME = re.compile(r"q(?P<mlp>[2-8])(?:a(?P<attention>[2-8]))?(?:_(?P<kind>[gr])(?P<size>\d+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerScheme:
    """How one kind of layer is quantized: W_hat = scale * codebook[indices], elementwise."""

    bits: int
    """Bits per index; the codebook has 2**bits values."""
    group_size: int = DEFAULT_GROUP_SIZE
    """Weights of a row that share a scale; 0 = the whole row. Not used when rank > 0."""
    rank: int = 0
    """Rank of the scale matrix (scale_a * magnitude) @ scale_b; 0 = one scale per group."""
    codebook: CodebookKind = "learned"
    """learned: fitted per tensor. uniform, balanced, int: fixed."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits {self.bits} is outside 2..8; choose 2 or 4")
        if self.group_size < 0 or self.rank < 0:
            raise ValueError(f"group size {self.group_size} and rank {self.rank} must be 0 or more")

    def groups_of(self, num_inputs: int) -> int:
        """Return the number of scales in a row.

        Raises:
            ValueError: If the group size does not divide the row.
        """
        group_size = self.group_size or num_inputs
        if num_inputs % group_size:
            raise ValueError(
                f"group size {group_size} does not divide a row of {num_inputs} weights; "
                f"choose a divisor such as {largest_divisor(num_inputs, group_size)}"
            )
        return num_inputs // group_size

    def size_bits(self, num_outputs: int, num_inputs: int) -> int:
        """Return everything a quantized (O, I) weight ships: indices, scales, codebook."""
        if self.rank:
            num_scales = self.rank * (num_outputs + num_inputs + 1)
        else:
            num_scales = num_outputs * self.groups_of(num_inputs)
        num_values = 2**self.bits if self.codebook == "learned" else 0
        return num_outputs * num_inputs * self.bits + SCALE_BITS * (num_scales + num_values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """How a model is quantized: one layer scheme for MLP layers, one for attention layers."""

    name: str
    mlp: LayerScheme
    attention: LayerScheme

    def layer(self, module_name: str) -> LayerScheme | None:
        """Return the scheme of a linear by the last part of its name; None = left dense."""
        kind = layer_kind(module_name)
        return None if kind is None else getattr(self, kind)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint header."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Scheme":
        """Return the scheme that `to_dict` described."""
        return cls(
            name=values["name"],
            mlp=LayerScheme(**values["mlp"]),
            attention=LayerScheme(**values["attention"]),
        )


def layer_kind(module_name: str) -> LayerKind | None:
    """Return what a linear is for, from the last part of its name."""
    last = module_name.rpartition(".")[2]
    if last in MLP_NAMES:
        return "mlp"
    return "attention" if last in ATTENTION_NAMES else None


def scheme_from_name(name: str) -> Scheme:
    """Return the scheme that a name such as `q2a4` stands for.

    Raises:
        ValueError: If the name does not follow the grammar of this module.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"scheme {name!r} is unknown; write q{{MLP bits}}a{{attention bits}}, with _gN for the "
            "group size or _rN for the rank of the scales: q2a4, q4a4, q2a4_g64, q4a4_r32"
        )
    common: dict[str, int] = {}
    if match["kind"] == "g":
        common["group_size"] = int(match["size"])
    elif match["kind"] == "r":
        common["rank"] = int(match["size"])
    mlp_bits = int(match["mlp"])
    attention_bits = int(match["attention"] or mlp_bits)
    return Scheme(
        name=name,
        mlp=LayerScheme(bits=mlp_bits, **common),
        attention=LayerScheme(bits=attention_bits, **common),
    )


def with_mlp(scheme: Scheme, name: str, **changes: Any) -> Scheme:
    """Return a scheme that differs in its MLP layers only."""
    return replace(scheme, name=name, mlp=replace(scheme.mlp, **changes))


def largest_divisor(number: int, at_most: int) -> int:
    """Return the largest divisor of `number` that does not exceed `at_most`."""
    return next(d for d in range(min(number, at_most), 0, -1) if number % d == 0)
