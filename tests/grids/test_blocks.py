"""Blocks of GGUF types hold the grid that training used, to the bit."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.grids.blocks import (
    BLOCK_TYPES,
    IQ4_VALUES,
    pack_blocks,
    pack_dense,
    quantize_q8_0,
    unpack_blocks,
)
from qat.grids.scalar import dequantize, fixed_codebook, snap_float16
from qat.quant.spec import FORMATS, GGUF_TYPES, gguf_type_of, make_spec

GRIDS = {name: grid for grid, name in GGUF_TYPES.items()}


def random_weight(name, seed, rows=3, blocks=2):
    """Return random indices, scales of either sign, offsets or None, and the codebook."""
    kind, bits, group_size = GRIDS[name]
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, blocks * group_size)
    indices = torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)
    size = 10.0 ** (seed % 5 - 3)
    scale = snap_float16(torch.randn(rows, blocks, generator=generator) * size)
    offset = snap_float16(torch.randn(rows, blocks, generator=generator) * size)
    return indices, scale, offset if kind == "uint" else None, fixed_codebook(kind, bits)


def weight_by_definition(data, name):
    """Return a row's weights by the type's definition, one at a time from its bytes."""
    kind, weights = BLOCK_TYPES[name], []
    for start in range(0, len(data), kind.num_bytes):
        (d,) = struct.unpack_from("<e", data, start)
        m = struct.unpack_from("<e", data, start + 2)[0] if name == "q4_1" else None
        body = data[start + (2 if m is None else 4) : start + kind.num_bytes]
        for j in range(kind.num_weights):
            if name == "q8_0":
                value = body[j] - 256 if body[j] > 127 else body[j]
            elif name == "q2_0":
                value = (body[j // 4] >> (2 * (j % 4)) & 3) - 1
            else:
                q = body[j] & 15 if j < 16 else body[j - 16] >> 4
                value = {"iq4_nl": IQ4_VALUES[q], "q4_1": q}.get(name, q - 8)
            # torch rounds the sum to float32 once; so does a double sum of exact products
            weights.append(float(torch.tensor(value * d)) + (m or 0.0))
    return weights


@pytest.mark.parametrize("name", GRIDS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_blocks_hold_the_weights_of_training(name, seed):
    """Training's weight = unpacked = the definition's double loop, scales of either sign."""
    indices, scale, offset, codebook = random_weight(name, seed)
    trained = dequantize(indices, scale, codebook, offset)
    packed = pack_blocks(indices, scale, offset, name)
    assert packed.shape[1] * BLOCK_TYPES[name].num_weights == (
        indices.shape[1] * BLOCK_TYPES[name].num_bytes
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
    for name in ("q4_0", "q2_0", "iq4_nl", "q8_0", "q4_1"):
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
    ],
)
def test_other_grids_have_no_type(spec):
    """A learned codebook, another group size, low-rank or float32 scales fit no block."""
    assert gguf_type_of(spec) is None
