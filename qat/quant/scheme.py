"""Schemes: how each kind of layer is quantized, by name.

A name reads MLP bits, then attention bits: `q2a4` keeps MLP weights at 2 bits and attention weights
at 4 (A never means activations). `_gN` sets weights per scale, `_rN` takes low-rank scales of
rank N instead: `q2a4_g64`, `q4a4_r32`. `q4_r32` is short for `q4a4_r32`.

`_int` takes the integer grids that runtimes hold instead of learned codebooks, with scales of
either sign: 2 bits are {-2, -1, 0, 1} per 64 weights (GGUF Q2_0), 4 bits -8 .. 7 per 32 (Q4_0).

A format's own name takes the grid which that format holds, for all layers or, joined by a plus, for
MLP and attention: `gguf-q4_0`, `gguf-q2_0+gguf-iq4_nl`. `deploy` is the pair that GGUF, MLX and
compressed-tensors hold alike: `w2a16-g64+w4a16-g32`.
"""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

STORED_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}
DEFAULT_GROUP_SIZE = 32
INT_GROUP_SIZES = {2: 64}  # blocks of GGUF Q2_0; others as Q4_0

LayerKind = Literal["mlp", "attention"]
CodebookKind = Literal["learned", "uniform", "balanced", "int", "iq4_nl"]
StoredDtype = Literal["float16", "bfloat16", "float32"]

MLP_NAMES = ("gate_proj", "up_proj", "down_proj")
ATTENTION_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")

RUNTIME_CODEBOOKS = ("int", "iq4_nl")  # whose values files of runtimes cannot change
SIGNED_CODEBOOKS = ("learned", *RUNTIME_CODEBOOKS)

_NAME = re.compile(
    r"q(?P<mlp>[2-8])(?:a(?P<attention>[2-8]))?(?P<int>_int)?(?:_(?P<kind>[gr])(?P<size>\d+))?"
)


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
    """learned: fitted per tensor. uniform, balanced, int, iq4_nl: fixed."""
    stored_dtype: StoredDtype = "float16"
    """Of scales and codebook, in files and so in the forward. bfloat16: numbers of both bfloat16
    and float16, for runtimes that cast scales to the dtype of activations. Checkpoints of other
    programs may need float32 to stay what they are; `qat snap-fp16` moves them to float16."""
    scale_floor: float | None = None
    """A scale below it counts as it, as in checkpoints of the seeds' first form; None = as is."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits {self.bits} is outside 2..8; choose 2 or 4")
        if self.group_size < 0 or self.rank < 0:
            raise ValueError(f"group size {self.group_size} and rank {self.rank} must be 0 or more")
        if self.codebook == "iq4_nl" and self.bits != 4:
            raise ValueError(f"codebook iq4_nl has 16 values, not 2**{self.bits}; set bits to 4")

    @property
    def is_signed(self) -> bool:
        """Whether a group's scale may be negative: these codebooks reach further on one side."""
        return self.codebook in SIGNED_CODEBOOKS and not self.rank

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
        stored_bits = STORED_BITS[self.stored_dtype]
        return num_outputs * num_inputs * self.bits + stored_bits * (num_scales + num_values)


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
        """Return the scheme that `to_dict` described.

        Raises:
            ValueError: If a field is missing or unknown.
        """
        try:
            return cls(
                name=values["name"],
                mlp=LayerScheme(**values["mlp"]),
                attention=LayerScheme(**values["attention"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"scheme {values} has other fields than this version reads ({error}); "
                "make the checkpoint again"
            ) from error


# The grids that files of runtimes hold, by the formats' own names. Scales of w*a16 formats are
# cast to the dtype of activations where they run, so they are numbers of both 16-bit dtypes.
FORMATS = {
    "gguf-q4_0": LayerScheme(bits=4, group_size=32, codebook="int"),
    "gguf-q2_0": LayerScheme(bits=2, group_size=64, codebook="int"),
    "gguf-iq4_nl": LayerScheme(bits=4, group_size=32, codebook="iq4_nl"),
    "gguf-q8_0": LayerScheme(bits=8, group_size=32, codebook="int"),
    "mlx-4bit-g32": LayerScheme(bits=4, group_size=32, codebook="int"),
    "mlx-2bit-g64": LayerScheme(bits=2, group_size=64, codebook="int"),
    "w4a16-g32": LayerScheme(bits=4, group_size=32, codebook="int", stored_dtype="bfloat16"),
    "w2a16-g64": LayerScheme(bits=2, group_size=64, codebook="int", stored_dtype="bfloat16"),
    "coreml-lut4": LayerScheme(bits=4, group_size=0),
    "coreml-lut2": LayerScheme(bits=2, group_size=0),
}
PAIRS = {"deploy": "w2a16-g64+w4a16-g32"}


TYPE_OF_GRID = {
    ("int", 4, 32): "q4_0",
    ("int", 2, 64): "q2_0",
    ("int", 8, 32): "q8_0",
    ("iq4_nl", 4, 32): "iq4_nl",
}


def block_type_of(scheme: LayerScheme) -> str | None:
    """Return the type whose grid is a layer scheme's, None where no type has it."""
    if scheme.rank or scheme.scale_floor is not None or scheme.stored_dtype == "float32":
        return None
    return TYPE_OF_GRID.get((scheme.codebook, scheme.bits, scheme.group_size))


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
    if name in PAIRS or name.partition("+")[0] in FORMATS:
        return scheme_of_formats(name)
    match = _NAME.fullmatch(name)
    if match is None or (match["kind"] == "r" and not int(match["size"])):
        raise ValueError(
            f"scheme {name!r} is unknown; write q{{MLP bits}}a{{attention bits}}, with _gN for the "
            "group size or _rN for the rank of the scales and _int before it for the integer grids "
            "of runtimes: q2a4, q4a4, q2a4_g64, q4a4_r32, q2a4_int; or formats, MLP+attention, "
            f"each of {', '.join(FORMATS)}; or {', '.join(PAIRS)}"
        )
    common: dict[str, Any] = {}
    if match["kind"] == "g":
        common["group_size"] = int(match["size"])
    elif match["kind"] == "r":
        common["rank"] = int(match["size"])
    mlp_bits = int(match["mlp"])
    attention_bits = int(match["attention"] or mlp_bits)
    layer = int_layer if match["int"] else LayerScheme
    return Scheme(
        name=name,
        mlp=layer(bits=mlp_bits, **common),
        attention=layer(bits=attention_bits, **common),
    )


def scheme_of_formats(name: str) -> Scheme:
    """Return the scheme that formats' names stand for: one for all layers, or MLP+attention.

    Raises:
        ValueError: If one of the names is no format's.
    """
    mlp, plus, attention = PAIRS.get(name, name).partition("+")
    parts = [mlp, attention if plus else mlp]
    for part in parts:
        if part not in FORMATS:
            raise ValueError(
                f"scheme {name!r}: {part!r} is no format; choose from {', '.join(FORMATS)}"
            )
    return Scheme(name=name, mlp=FORMATS[parts[0]], attention=FORMATS[parts[1]])


def int_layer(bits: int, **changes: Any) -> LayerScheme:
    """Return the scheme of an integer grid in the group size of its runtime format."""
    group_size = INT_GROUP_SIZES.get(bits, DEFAULT_GROUP_SIZE)
    return LayerScheme(**{"bits": bits, "group_size": group_size, "codebook": "int", **changes})


def with_mlp(scheme: Scheme, name: str, **changes: Any) -> Scheme:
    """Return a scheme that differs in its MLP layers only."""
    return replace(scheme, name=name, mlp=replace(scheme.mlp, **changes))


def largest_divisor(number: int, at_most: int) -> int:
    """Return the largest divisor of `number` that does not exceed `at_most`."""
    return next(d for d in range(min(number, at_most), 0, -1) if number % d == 0)
