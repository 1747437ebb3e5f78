"""Blocks of GGUF types hold the grid that training used, to the bit."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.grids.blocks import (
    BLOCK_TYPES,
    pack_dense,
    pack_parts,
    quantize_q8_0,
    unpack_blocks,
)
from qat.quant.spec import FORMATS, GGUF_TYPES, gguf_type_of, make_spec
from tests.tiny import random_tensor

TYPES = sorted(GGUF_TYPES.values())
MAGNITUDES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)  # of E2M1
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def ternary_at(body, j, name):
    """Return weight j of a block of TQ1_0 or TQ2_0 over its scale."""
    if name == "tq2_0":
        half, rest = divmod(j, 128)
        place, byte = divmod(rest, 32)
        return (body[32 * half + byte] >> (2 * place) & 3) - 1
    start, first, width = next(s for s in ((240, 48, 4), (160, 32, 16), (0, 0, 32)) if j >= s[0])
    place, byte = divmod(j - start, width)
    return ((body[first + byte] * 3**place & 255) * 3 >> 8) - 1


def value_at(body, j, name):
    """Return weight j of a block over its scale, from the bytes next to its scales."""
    if name in ("tq1_0", "tq2_0"):
        return ternary_at(body, j, name)
    if name == "q8_0":
        return body[j] - 256 if body[j] > 127 else body[j]
    if name == "q2_0":
        return (body[j // 4] >> (2 * (j % 4)) & 3) - 1
    bits = body[4:] if name in ("q5_0", "q5_1") else body
    q = bits[j] & 15 if j < 16 else bits[j - 16] >> 4
    if name in ("q5_0", "q5_1"):
        q |= (struct.unpack_from("<I", body)[0] >> j & 1) << 4
    if name == "mxfp4":
        return MAGNITUDES[q & 7] * (-1 if q & 8 else 1)
    offsets = {"q4_0": -8, "q5_0": -16}
    return IQ4_VALUES[q] if name == "iq4_nl" else q + offsets.get(name, 0)


def weight_by_definition(data, name):
    """Return a row's weights by the type's definition, one at a time from its bytes."""
    kind, weights = BLOCK_TYPES[name], []
    for start in range(0, len(data), kind.num_bytes):
        block, m = data[start : start + kind.num_bytes], 0.0
        if name == "mxfp4":
            d, body = 2.0 ** (block[0] - 127), block[1:]
        elif name in ("tq1_0", "tq2_0"):
            (d,), body = struct.unpack("<e", block[-2:]), block[:-2]
        elif name in ("q4_1", "q5_1"):
            (d, m), body = struct.unpack_from("<ee", block), block[4:]
        else:
            (d,), body = struct.unpack_from("<e", block), block[2:]
        # torch rounds the sum to float32 once; so does a double sum of exact products
        values = (value_at(body, j, name) * d for j in range(kind.num_weights))
        weights += [float(torch.tensor(value)) + m for value in values]
    return weights


@pytest.mark.recipe
@pytest.mark.parametrize("name", TYPES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_blocks_hold_the_weights_of_training(name, seed):
    """Training's weight = unpacked = the definition's double loop, scales of either sign."""
    quantized = random_tensor(name, seed=seed)
    trained = quantized.dequantize()
    packed = pack_parts(quantized.indices, quantized.parts, name)
    assert packed.shape[1] * BLOCK_TYPES[name].num_weights == (
        trained.shape[1] * BLOCK_TYPES[name].num_bytes
    )
    assert torch.equal(unpack_blocks(packed, name), trained)
    rows = [weight_by_definition(bytes(row.tolist()), name) for row in packed]
    assert torch.equal(torch.tensor(rows), trained)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_dense_types_hold_numbers_of_their_dtype(name):
    """Nothing is lost but what the dtype rounds."""
    tensor = torch.randn(3, 8)
    packed = pack_dense(tensor, name)
    assert packed.shape == (3, 8 * BLOCK_TYPES[name].num_bytes)
    again = unpack_blocks(packed, name)
    assert torch.equal(pack_dense(again, name), packed)
    assert (again == tensor).all() == (name == "f32")


def test_a_dense_weight_is_rounded_to_q8_0_as_ggml_does():
    """Scale = largest / 127, halves away from zero; rows of zeros stay zeros."""
    weight = torch.randn(4, 64)
    weight[0] = 0
    unpacked = unpack_blocks(quantize_q8_0(weight), "q8_0")
    for row, found in zip(weight.view(-1, 32), unpacked.view(-1, 32), strict=True):
        d = float(row.abs().max() / 127)
        stored = float(torch.tensor(d).half())
        expected = [int(abs(w) / d + 0.5) * (1 if w >= 0 else -1) if d else 0 for w in row.tolist()]
        assert torch.equal(found, torch.tensor([q * stored for q in expected]))


def test_weights_that_lie_on_q8_0_are_kept():
    """Embeddings that came out of a Q8_0 file go back as they were."""
    weight = unpack_blocks(quantize_q8_0(torch.randn(8, 64)), "q8_0")
    assert torch.equal(unpack_blocks(quantize_q8_0(weight), "q8_0"), weight)


def test_formats_by_name_have_their_blocks():
    """`gguf:X` trains on the grid of type X, and the deploy pair's layers have types as well."""
    for name in TYPES:
        assert gguf_type_of(FORMATS[f"gguf:{name}"]) == name
    assert gguf_type_of(FORMATS["w4a16-g32"]) == "q4_0"
    assert gguf_type_of(FORMATS["w2a16-g64"]) == "q2_0"


@pytest.mark.parametrize(
    "spec",
    [
        make_spec(bits=4),
        make_spec(bits=2, codebook="int"),
        make_spec(bits=4, codebook="int", rank=2),
        make_spec(bits=4, codebook="int", stored_dtype="float32"),
        make_spec(bits=4, codebook="int", floor=1e-8),
        make_spec(bits=4, group_size=64, codebook="mxfp4"),
    ],
)
def test_other_grids_have_no_type(spec):
    """A learned codebook, another group size, low-rank or float32 scales fit no block."""
    assert gguf_type_of(spec) is None
