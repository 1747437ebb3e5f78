"""Formats of one tensor: their names, their sizes, the values they hold."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.grids.blocks import BLOCK_TYPES, TAILED, pack_parts
from qat.grids.packing import pack
from qat.grids.scalar import (
    IQ4_NL,
    LISTED_BITS,
    CodebookKind,
    dequantize,
    fixed_codebook,
    nearest_power,
    snap_bfloat16,
    snap_float16,
)
from qat.quant.fit import fit_weight
from qat.quant.spec import (
    FORMATS,
    GGUF_TYPES,
    K_FORMATS,
    SUPER_SCALES,
    TensorSpec,
    gguf_type_of,
    make_spec,
)
from qat.quant.straight_through import SnapBfloat16
from tests.tiny import random_tensor

GGUF_FORMATS = [name for name in FORMATS if name.startswith("gguf:")]
SCALAR_FORMATS = [name for name, spec in FORMATS.items() if spec.grid and spec.grid.num_values]


@st.composite
def specs(draw) -> TensorSpec:
    """Draw a spec of any grid, scales and dtype."""
    kind = draw(st.sampled_from([*get_args(CodebookKind)]))
    rank = 0 if kind == "uint" else draw(st.integers(0, 64))
    return make_spec(
        draw(st.sampled_from(LISTED_BITS.get(kind, range(2, 9)))),
        group_size=draw(st.integers(0, 256)),
        rank=rank,
        codebook=kind,
        stored_dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        floor=draw(st.none() | st.floats(1e-9, 1e3)),
    )


@pytest.mark.recipe
@settings(max_examples=200, deadline=None)
@given(spec=specs())
def test_a_name_says_all_of_a_format(spec):
    """A checkpoint header holds names only, and reads back the same format."""
    assert TensorSpec.from_name(spec.name) == spec


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_format_keeps_its_name(name):
    """And its canonical name in the grammar stands for the same format."""
    spec = TensorSpec.from_name(name)
    assert spec.name == name
    if spec.is_quantized:
        assert TensorSpec.from_name(spec.with_scale(spec.scale).name) == spec


@pytest.mark.parametrize("name", ["gguf:q3_K", "gguf:Q3_K", "gguf:q3_k"])
def test_gguf_names_are_read_in_any_case(name):
    """As llama.cpp and its tools write them; ours are in small letters."""
    assert TensorSpec.from_name(name).name == "gguf:q3_k"


@pytest.mark.parametrize("name", ["", "lut2", "lut9-g32", "int1-r4", "lut2-g0", "q2a4", "gguf:q9"])
def test_an_unknown_name_is_refused_with_names_that_work(name):
    """The message shows the grammar and the list of runtimes' formats."""
    with pytest.raises(ValueError, match=r"is unknown; write KIND.*lut2-g32.*gguf:q4_0"):
        TensorSpec.from_name(name)


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_a_gguf_format_has_the_size_of_its_blocks(name):
    """`size_bytes` is what the exporter writes, and a spec finds its type again."""
    spec = FORMATS[name]
    weight = torch.randn(6, 256)
    quantized = fit_weight(weight, spec, num_rounds=1)
    packed = pack_parts(quantized.indices, quantized.parts, name.removeprefix("gguf:"))
    tail = BLOCK_TYPES[name.removeprefix("gguf:")].tail_bytes
    assert spec.size_bytes((6, 256)) == packed.nbytes + tail
    assert gguf_type_of(spec) == name.removeprefix("gguf:")


def test_every_gguf_type_has_a_name():
    """What the exporter can write can be asked for."""
    types = sorted([*GGUF_TYPES.values(), *SUPER_SCALES, *K_FORMATS, *TAILED])
    assert types == sorted(name.removeprefix("gguf:") for name in GGUF_FORMATS)


@pytest.mark.parametrize(
    "spec",
    [
        make_spec(2),
        make_spec(4, rank=3, codebook="int"),
        make_spec(4, codebook="int", floor=0.01),
        make_spec(4, codebook="int", stored_dtype="float32"),
        FORMATS["f16"],
    ],
)
def test_formats_that_gguf_lacks_have_no_type(spec):
    """None, so that the exporter can say what to convert to."""
    assert gguf_type_of(spec) is None


@pytest.mark.recipe
@settings(max_examples=30, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(4, 9),
    groups=st.integers(1, 4),
    rank=st.sampled_from([0, 0, 1, 3]),
    codebook=st.sampled_from(["learned", "uint", "int"]),
)
def test_the_size_counts_everything_that_ships(bits, rows, groups, rank, codebook):
    """Equal to packed indices, scales and codebook of a real fit; the last byte's padding apart."""
    rank = 0 if codebook == "uint" else rank
    spec = make_spec(bits=bits, group_size=4, rank=rank, codebook=codebook)
    weight = torch.randn(rows, groups * 4)
    quantized = fit_weight(weight, spec, num_rounds=1)
    ships = {n: p for n, p in quantized.parts.items() if n != "codebook" or codebook == "learned"}
    stored = 16 * sum(part.numel() for part in ships.values())
    padding = -weight.numel() * bits % 8
    packed = 8 * len(pack(quantized.indices, bits)) - padding
    assert spec.size_bits((rows, groups * 4)) == packed + stored


def test_a_fixed_codebook_ships_nothing():
    """Its values are known from its name."""
    learned, fixed = (make_spec(bits=2, codebook=kind) for kind in ("learned", "uniform"))
    assert learned.size_bits((8, 64)) - fixed.size_bits((8, 64)) == 16 * 4


def test_a_dense_tensor_has_the_size_of_its_dtype():
    """Any number of sides."""
    assert FORMATS["f16"].size_bytes((3, 5)) == 30
    assert FORMATS["f32"].size_bytes((7,)) == 28


@pytest.mark.parametrize(
    "wrong", [{"bits": 1}, {"bits": 9}, {"bits": 2, "group_size": -1}, {"bits": 2, "rank": -1}]
)
def test_numbers_without_a_meaning_are_refused(wrong):
    """At once, not in the fit."""
    with pytest.raises(ValueError, match="outside 2..8|must be [01] or more"):
        make_spec(**wrong)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gguf:q2_0", True),
        ("gguf:q4_k", True),
        ("int4-g32", True),
        ("lut2-g32", False),
        ("gguf:i2_s", False),
        ("f16", False),
    ],
)
def test_rows_with_parts_in_common_are_not_fitted_alone(name, expected):
    """A learned codebook and a scale of the whole tensor are; a dense tensor is not fitted."""
    assert TensorSpec.from_name(name).has_own_rows == expected


def test_iq4_nl_has_the_values_of_its_type():
    """Ascending int8 numbers; four bits and no others."""
    codebook = fixed_codebook("iq4_nl", 4)
    assert codebook.tolist() == sorted(IQ4_NL)
    assert len(codebook) == 16
    with pytest.raises(ValueError, match="set bits to 4"):
        make_spec(bits=2, codebook="iq4_nl")


def test_powers_of_two_take_a_byte_each_in_files():
    """Of any scale that training leaves, the nearest; codebook and offset stay float16."""
    spec, scale = FORMATS["gguf:mxfp4"], torch.randn(6, 4).exp() * 0.01
    stored = spec.store_part("scale", scale)
    assert (stored.dtype, stored.shape) == (torch.uint8, (6, 4))
    assert torch.equal(spec.load_part("scale", stored, (6, 4)), spec.snap_part("scale", scale))
    assert (spec.snap_part("scale", scale) / scale - 1).abs().max() < 0.34
    codebook = spec.grid.start_codebook()
    assert torch.equal(spec.snap_part("codebook", codebook), codebook)


@pytest.mark.parametrize("name", ["gguf:tq1_0", "gguf:q5_1", "gguf:mxfp4"])
def test_rows_that_are_no_whole_blocks_are_refused(name):
    """With the block, the row and a size that fits."""
    block = FORMATS[name].group_size
    with pytest.raises(ValueError, match=f"group size {block} .* a row of {block + 16} weights"):
        FORMATS[name].check((4, block + 16))


@pytest.mark.parametrize("name", ["gguf:q4_0", "gguf:q2_0", "gguf:iq4_nl", "gguf:q5_0"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_weights_on_the_grid_are_found_again(name, sign):
    """A fit to weights that lie on a format's grid, scales of either sign, loses nothing."""
    spec = FORMATS[name]
    codebook = spec.grid.start_codebook()
    indices = torch.randint(len(codebook), (6, 128), dtype=torch.uint8)
    indices[:, :: spec.group_size] = 0  # the end of the longer arm is taken
    scale = sign * snap_float16(torch.rand(6, 128 // spec.group_size) + 0.1)
    weight = dequantize(indices, scale, codebook)
    assert torch.equal(fit_weight(weight, spec).dequantize(), weight)


@pytest.mark.parametrize("name", ["mxfp4", "tq1_0", "tq2_0"])
def test_weights_on_a_symmetric_grid_are_found_again(name):
    """Every value of it in each group, at powers of two."""
    on_grid = random_tensor(name, seed=3, rows=6)
    weight = on_grid.replaced(scale=nearest_power(on_grid.scale.abs())).dequantize()
    assert torch.equal(fit_weight(weight, on_grid.spec).dequantize(), weight)


@pytest.mark.parametrize("name", SCALAR_FORMATS)
def test_products_of_scale_and_value_are_exact(name):
    """In float32 as in float64, so that no order of operations changes a weight."""
    codebook = snap_float16(FORMATS[name].grid.start_codebook())
    scale = snap_float16(torch.randn(64, 1))
    exact = scale.double() * codebook.double()
    assert torch.equal((scale * codebook).double(), exact)


def test_scales_of_both_dtypes_lose_nothing_in_either():
    """Also below the normal range of float16, where its numbers get coarse; zero stays zero."""
    values = torch.randn(4000) * 2.0 ** torch.randint(-30, 16, (4000,))
    values[0] = 0
    snapped = snap_bfloat16(values)
    assert torch.equal(snapped.bfloat16().float(), snapped)
    assert torch.equal(snapped.half().float(), snapped)
    assert torch.equal(snap_bfloat16(snapped), snapped)
    assert snapped[0] == 0
    normal = (values.abs() > 2**-14) & (values.abs() < 60000)
    assert ((snapped - values).abs()[normal] <= values.abs()[normal] * 2.0**-8).all()


def test_the_gradient_passes_through_the_rounding_to_both_dtypes():
    """Backward is the identity, exactly."""
    values = torch.randn(50, requires_grad=True)
    gradient = torch.arange(50.0)
    SnapBfloat16.apply(values).backward(gradient)
    assert torch.equal(values.grad, gradient)


def test_offsets_and_low_rank_scales_exclude_each_other():
    """A grid of 0 .. 15 without offsets would hold no negative weight."""
    with pytest.raises(ValueError, match="scales of rank 4 none"):
        make_spec(4, codebook="uint", rank=4)
    with pytest.raises(ValueError, match="scales of rank 8 none"):
        TensorSpec.from_name("affine4-r8")
