"""`TensorSpec`: the format of one tensor, and the grammar of its names.

    lut2-g32    a codebook of 2**2 values fitted per tensor, a scale for each 32 weights of a row
    lut2-r8     the same with scales of rank 8; lut2-row: one scale for the whole row;
                ternary2-tensor: one for the whole tensor
    int4-g32    integers -8 .. 7, scales of either sign; uniform, balanced, iq4_nl likewise
    mxfp44-g32  the 15 values of E2M1 times a power of two; ternary2-g256: -1, 0, 1 times a scale
    affine4-g64 integers 0 .. 15 with a scale and an offset for each group
    f32, f16, bf16    not quantized

A suffix `-bf16` or `-f32` says how scales and codebooks are stored; float16 without one. Names of
runtimes' formats stand for the grids that their files hold: `gguf:q4_0`, `gguf:q4_k` (scales and
offsets of super-blocks; any case), `gguf:iq2_s` (a vector grid), `mlx:4bit-g64`, `w4a16-g32`
(compressed-tensors), `coreml:lut4`.

Shape legend: O out, I in.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from qat.grids.packing import pack, unpack
from qat.grids.scalar import (
    LISTED_VALUES,
    ScalarGrid,
    exponent_bytes,
    nearest_power,
    powers_of,
    snap_stored,
)
from qat.grids.scales import GroupScale, LowRankScale, TensorScale
from qat.grids.super_blocks import SuperBlockScale
from qat.grids.vectors import VectorGrid

StoredDtype = Literal["float16", "bfloat16", "float32"]
Grid = ScalarGrid | VectorGrid
Scale = GroupScale | LowRankScale | SuperBlockScale

STORED_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}
DENSE_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
DTYPE_SUFFIXES = {"float16": "", "bfloat16": "-bf16", "float32": "-f32"}
PREFIXES = {"learned": "lut", "uint": "affine"}  # of codebooks named otherwise than by their kind
EXACT_BITS = 5  # of MLX formats: of more, exact scales of float16 would be too coarse
RUNTIME_CODEBOOKS = ("int", "uint", *LISTED_VALUES)  # whose values files of runtimes cannot change

_NAME = re.compile(
    rf"(?P<kind>lut|int|affine|uniform|balanced|{'|'.join(LISTED_VALUES)})(?P<bits>[2-8]|1\.625)"
    r"-(?:g(?P<group>[1-9]\d*)|r(?P<rank>[1-9]\d*)|(?P<whole>row|tensor))"
    r"(?:-floor(?P<floor>[\d.e-]+?))?(?P<dtype>-bf16|-f32)?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """The format of one tensor: W_hat = scale * grid value (+ offset), elementwise."""

    grid: Grid | None
    """The values that weights take; None = not quantized."""
    scale: Scale | None
    """What the values are multiplied by; None = not quantized."""
    stored_dtype: StoredDtype = "float16"
    """Of scales and codebook, in files and so in the forward; of the tensor itself where it is not
    quantized. bfloat16: numbers of both bfloat16 and float16, for runtimes that cast scales to the
    dtype of activations. Checkpoints of other programs may need float32 to stay what they are;
    `qat snap-fp16` moves them to float16."""
    name: str = field(default="", compare=False)
    """As in the grammar of this module; found from the other fields when not given."""

    def __post_init__(self) -> None:
        if self.is_quantized and self.rank and self.grid.kind == "uint":
            raise ValueError(f"affine grids have offsets, scales of rank {self.rank} none; use int")
        if not self.name:
            object.__setattr__(self, "name", canonical_name(self))

    @property
    def is_quantized(self) -> bool:
        """Whether the tensor lies on a grid."""
        return self.grid is not None

    @property
    def has_own_rows(self) -> bool:
        """Whether no part is common to rows, so that any of them can be fitted alone."""
        if not self.is_quantized:
            return False
        return not (self.rank or self.grid.is_learned or isinstance(self.scale, TensorScale))

    @property
    def is_vector(self) -> bool:
        """Whether several weights are rounded together."""
        return self.grid is not None and self.grid.block_size > 1

    @property
    def bits(self) -> int | float:
        """Bits of indices per weight."""
        return self.grid.bits

    @property
    def rank(self) -> int:
        """Rank of the scales; 0 = one scale per group."""
        return self.scale.rank

    @property
    def group_size(self) -> int:
        """Weights of a row that share a scale; 0 = the whole row, or low-rank scales."""
        return self.scale.group_size

    @property
    def floor(self) -> float | None:
        """Least scale, in checkpoints of the seeds' first form."""
        return self.scale.floor

    @property
    def is_signed(self) -> bool:
        """Whether a group's scale may be negative."""
        return self.grid.is_signed and not self.rank

    @property
    def has_offset(self) -> bool:
        """Whether groups have an offset."""
        return self.scale.has_offset

    @property
    def has_fixed_values(self) -> bool:
        """Whether a runtime's file fixes the grid's values, so that they cannot train."""
        return self.grid.kind in RUNTIME_CODEBOOKS

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that the format does not fit.

        Raises:
            ValueError: If so; says what would fit.
        """
        if self.is_quantized:
            self.scale.check(shape)
            self.grid.check(shape)

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of scales and codebook of an (O, I) weight, by name."""
        count = self.grid.num_values
        return {**self.scale.part_shapes(shape), **({"codebook": (count,)} if count else {})}

    def is_power(self, name: str) -> bool:
        """Whether scales or a codebook are powers of two, of which files hold exponents."""
        return name == "scale" and self.scale.is_power

    def snap_part(self, name: str, values: Tensor) -> Tensor:
        """Return scales or a codebook as a file holds them, in float32."""
        if bits := self.scale.integer_bits.get(name):
            return values.round().clamp(0, 2**bits - 1)
        if self.is_power(name):
            return nearest_power(values)
        return snap_stored(values, self.stored_dtype)

    def store_part(self, name: str, values: Tensor) -> Tensor:
        """Return scales or a codebook in a file's dtype; small integers packed, flat."""
        values = self.snap_part(name, values)
        if bits := self.scale.integer_bits.get(name):
            return pack(values, bits)
        if self.is_power(name):
            return exponent_bytes(values)
        return values.to(getattr(torch, self.stored_dtype))

    def load_part(self, name: str, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return what `store_part` was given, as float32 numbers; integers in a shape."""
        if bits := self.scale.integer_bits.get(name):
            return unpack(stored, bits, shape).float()
        if self.is_power(name):
            return powers_of(stored)
        return stored.float()

    def size_bits(self, shape: tuple[int, ...]) -> int:
        """Return the bits of everything that a tensor ships: indices, scales, codebook."""
        stored_bits = STORED_BITS[self.stored_dtype]
        if not self.is_quantized:
            count = 1
            for side in shape:
                count *= side
            return count * stored_bits
        codebook = self.grid.num_values if self.grid.is_learned else 0
        scales = self.scale.size_bits(shape, stored_bits)
        return self.grid.size_bits(shape) + scales + stored_bits * codebook

    def size_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes that a file holds for a tensor of a shape."""
        return -(-self.size_bits(shape) // 8)

    def with_scale(self, scale: Scale) -> "TensorSpec":
        """Return the spec with other scales."""
        return replace(self, scale=scale, name="")

    def with_rank(self, rank: int) -> "TensorSpec":
        """Return the spec with scales of a rank; itself where it has that rank."""
        return self if rank == self.rank else self.with_scale(LowRankScale(rank, self.floor))

    def without_floor(self) -> "TensorSpec":
        """Return the spec with unfloored scales."""
        return self.with_scale(replace(self.scale, floor=None))

    def stored_as(self, dtype: StoredDtype) -> "TensorSpec":
        """Return the spec with scales and codebook stored in another dtype."""
        return replace(self, stored_dtype=dtype, name="")

    @classmethod
    def from_name(cls, name: str) -> "TensorSpec":
        """Return the format that a name stands for.

        Raises:
            ValueError: If the name does not follow the grammar of this module.
        """
        if name.lower().startswith("gguf:"):
            name = name.lower()  # llama.cpp writes q4_K
        if name in FORMATS:
            return FORMATS[name]
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"format {name!r} is unknown; write KIND BITS - SCALES, such as lut2-g32, lut2-r8, "
                f"int4-g32, affine4-g64, or one of {', '.join(FORMATS)}"
            )
        kind = {"lut": "learned", "affine": "uint"}.get(match["kind"], match["kind"])
        floor = float(match["floor"]) if match["floor"] else None
        stored = next(d for d, suffix in DTYPE_SUFFIXES.items() if suffix == (match["dtype"] or ""))
        if match["whole"] == "tensor" and kind != "ternary":
            raise ValueError(f"format {name!r}: one scale a tensor is for ternary2; use {kind}-row")
        spec = make_spec(
            float(match["bits"]) if "." in match["bits"] else int(match["bits"]),
            group_size=int(match["group"] or 0),
            rank=int(match["rank"] or 0),
            codebook=kind,
            stored_dtype=stored,
            floor=floor,
        )
        return spec.with_scale(TensorScale()) if match["whole"] == "tensor" else spec


def make_spec(
    bits: int | float,
    *,
    group_size: int = 32,
    rank: int = 0,
    codebook: str = "learned",
    stored_dtype: StoredDtype = "float16",
    floor: float | None = None,
) -> TensorSpec:
    """Return the spec of a scalar grid.

    Args:
        bits: Bits per index.
        group_size: Weights of a row that share a scale; 0 = the whole row. Not used with a rank.
        rank: Rank of low-rank scales; 0 = one scale per group.
        codebook: As in `ScalarGrid.kind`; uint comes with offsets, mxfp4 with powers of two.
        stored_dtype: Of scales and codebook.
        floor: As in `GroupScale.floor`.
    """
    group = GroupScale(group_size, codebook == "uint", floor, codebook == "mxfp4")
    scale = LowRankScale(rank, floor) if rank else group
    return TensorSpec(grid=ScalarGrid(bits, codebook), scale=scale, stored_dtype=stored_dtype)


def canonical_name(spec: TensorSpec) -> str:
    """Return the name of a spec in the grammar of this module."""
    if not spec.is_quantized:
        return next(name for name, dtype in DENSE_DTYPES.items() if dtype == spec.stored_dtype)
    for kind, pair in K_FORMATS.items():
        if pair == (spec.grid, spec.scale):
            return f"gguf:{kind}{DTYPE_SUFFIXES[spec.stored_dtype]}"
    if not spec.grid.num_values:
        return f"gguf:{spec.grid.kind}{DTYPE_SUFFIXES[spec.stored_dtype]}"
    if spec.scale.exact_top:
        return f"mlx:{spec.bits}bit-g{spec.group_size}{DTYPE_SUFFIXES[spec.stored_dtype]}"
    kind = PREFIXES.get(spec.grid.kind, spec.grid.kind)
    whole = "tensor" if isinstance(spec.scale, TensorScale) else "row"
    size = f"r{spec.rank}" if spec.rank else f"g{spec.group_size}" if spec.group_size else whole
    floor = "" if spec.floor is None else f"-floor{spec.floor!r}"
    return f"{kind}{spec.bits}-{size}{floor}{DTYPE_SUFFIXES[spec.stored_dtype]}"


def named_formats() -> dict[str, TensorSpec]:
    """Return the formats of runtimes and the unquantized ones, by name."""
    both = {"stored_dtype": "bfloat16"}
    formats = {
        "gguf:q4_0": make_spec(4, codebook="int"),
        "gguf:q2_0": make_spec(2, group_size=64, codebook="int"),
        "gguf:iq4_nl": make_spec(4, codebook="iq4_nl"),
        "gguf:q8_0": make_spec(8, codebook="int"),
        "gguf:q4_1": make_spec(4, codebook="uint"),
        "gguf:q5_0": make_spec(5, codebook="int"),
        "gguf:q5_1": make_spec(5, codebook="uint"),
        "gguf:mxfp4": make_spec(4, codebook="mxfp4"),
        "gguf:tq1_0": make_spec(1.625, group_size=256, codebook="ternary"),
        "gguf:tq2_0": make_spec(2, group_size=256, codebook="ternary"),
        "gguf:i2_s": make_spec(2, codebook="ternary").with_scale(TensorScale()),
        "w4a16-g32": make_spec(4, codebook="int", **both),
        "w2a16-g64": make_spec(2, group_size=64, codebook="int", **both),
        "coreml:lut4": make_spec(4, group_size=0),
        "coreml:lut2": make_spec(2, group_size=0),
    }
    for bits in (2, 3, 4, 5, 6, 8):
        for size in (32, 64, 128):
            exact_top = 2**bits - 1 if bits <= EXACT_BITS else 0
            scale = GroupScale(size, has_offset=True, exact_top=exact_top)
            spec = make_spec(bits, group_size=size, codebook="uint").with_scale(scale)
            formats[f"mlx:{bits}bit-g{size}"] = spec
    named = {name: replace(spec, name=name) for name, spec in formats.items()}
    for kind, scale in SUPER_SCALES.items():
        spec = TensorSpec(grid=VectorGrid(kind), scale=scale)
        named[spec.name] = spec
    for kind, (grid, scale) in K_FORMATS.items():
        named[f"gguf:{kind}"] = TensorSpec(grid=grid, scale=scale, name=f"gguf:{kind}")
    for name, dtype in DENSE_DTYPES.items():
        named[name] = TensorSpec(grid=None, scale=None, stored_dtype=dtype, name=name)
    return named


# d * (0.5 + s) times a factor, of ggml's dequantize_row_*.
SUPER_SCALES = {
    kind: SuperBlockScale(sub_block, 256, sub_bits=4, shift=0.5, factor=factor)
    for kind, sub_block, factor in (
        ("iq2_xxs", 32, 0.25),
        ("iq2_xs", 16, 0.25),
        ("iq2_s", 16, 0.25),
        ("iq3_xxs", 32, 0.5),
        ("iq3_s", 32, 2.0),
    )
}
# Scalar grids with super-block scales: those of Q3_K, Q6_K and IQ4_XS have either sign.
K_FORMATS = {
    "q2_k": (ScalarGrid(2, "uint"), SuperBlockScale(16, 256, sub_bits=4, has_offset=True)),
    "q3_k": (ScalarGrid(3, "int"), SuperBlockScale(16, 256, sub_bits=6, shift=-32.0)),
    "q4_k": (ScalarGrid(4, "uint"), SuperBlockScale(32, 256, sub_bits=6, has_offset=True)),
    "q5_k": (ScalarGrid(5, "uint"), SuperBlockScale(32, 256, sub_bits=6, has_offset=True)),
    "q6_k": (ScalarGrid(6, "int"), SuperBlockScale(16, 256, sub_bits=8, shift=-128.0)),
    "iq4_xs": (ScalarGrid(4, "iq4_nl"), SuperBlockScale(32, 256, sub_bits=6, shift=-32.0)),
}
FORMATS = named_formats()
F32, F16 = FORMATS["f32"], FORMATS["f16"]

# (codebook, bits, group size) of a spec to the GGUF type that holds it exactly.
GGUF_TYPES = {
    ("int", 4, 32): "q4_0",
    ("int", 2, 64): "q2_0",
    ("int", 8, 32): "q8_0",
    ("iq4_nl", 4, 32): "iq4_nl",
    ("uint", 4, 32): "q4_1",
    ("int", 5, 32): "q5_0",
    ("uint", 5, 32): "q5_1",
    ("mxfp4", 4, 32): "mxfp4",
    ("ternary", 1.625, 256): "tq1_0",
    ("ternary", 2, 256): "tq2_0",
}


def gguf_type_of(spec: TensorSpec) -> str | None:
    """Return the GGUF type that holds a spec exactly, None where no type does."""
    if not spec.is_quantized or spec.rank or spec.floor is not None:
        return None
    if spec.stored_dtype == "float32":
        return None
    if isinstance(spec.scale, SuperBlockScale):
        kind = spec.name.removeprefix("gguf:").removesuffix(DTYPE_SUFFIXES["bfloat16"])
        return kind if kind in SUPER_SCALES or kind in K_FORMATS else None
    if isinstance(spec.scale, TensorScale):
        return "i2_s" if (spec.grid.kind, spec.bits) == ("ternary", 2) else None
    return GGUF_TYPES.get((spec.grid.kind, spec.bits, spec.group_size))
