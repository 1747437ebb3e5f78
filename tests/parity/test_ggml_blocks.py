"""Blocks that we write, dequantized by ggml's own C code, are the weights of training."""

import ctypes
from importlib.util import find_spec

import pytest
import torch

from qat.export.ggml import dequantize_blocks, open_ggml, quantize_anew
from qat.export.gguf_file import read_tensor_records, read_weight
from qat.export.to_gguf import export_to_gguf
from qat.grids.blocks import BLOCK_TYPES, pack_parts, quantize_q8_0
from qat.quant.spec import GGUF_TYPES
from tests.tiny import random_tensor, save_tiny, tiny_llama, tiny_student

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.parity

TYPES = sorted(GGUF_TYPES.values())


@pytest.fixture(scope="module")
def ggml():
    """Return libggml's base library."""
    if find_spec("libggml") is None:
        pytest.skip("libggml-python is not installed; `make parity` installs it")
    library = open_ggml()
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_get_tensor_size.restype = ctypes.c_size_t
    library.gguf_find_tensor.restype = ctypes.c_int64
    return library


@pytest.mark.parametrize("name", TYPES)
def test_c_gives_the_weights_of_training(ggml, name):
    """Scales of either sign, every index."""
    quantized = random_tensor(name, rows=16, blocks=8)
    packed = pack_parts(quantized.indices, quantized.parts, name)
    found = dequantize_blocks(ggml, packed, name, quantized.indices.numel())
    assert torch.equal(found.view(16, -1), quantized.dequantize())


@pytest.mark.parametrize("name", ["q1_0", "q5_0", "q3_K", "q6_K", "iq3_xxs", "iq1_m", "tq2_0"])
def test_types_of_other_programs_are_read_as_c_reads_them(ggml, tmp_path, name):
    """From any bytes: 0xBF keeps float16 scales below 2. Q1_0 is in no Python."""
    kind = gguf.GGMLQuantizationType[name.upper()]
    num_weights, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    packed = torch.randint(256, (3, 2 * num_bytes), dtype=torch.uint8) & 0xBF
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", packed.numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_weight(tmp_path / "x.gguf", read_tensor_records(tmp_path / "x.gguf")["x"])
    expected = dequantize_blocks(ggml, packed.flatten(), name, 6 * num_weights)
    assert found.shape == (3, 2 * num_weights)
    assert torch.allclose(found, expected.view_as(found), rtol=1e-6, atol=0)


def test_our_q8_0_is_that_of_c(ggml):
    """To the byte, for embeddings and heads."""
    weight = torch.randn(16, 128)
    weight[3] = 0
    packed = quantize_anew(ggml, weight, "q8_0")
    assert torch.equal(quantize_q8_0(weight).flatten(), packed)


@pytest.mark.parametrize("name", ["q4_0", "q2_0", "iq4_nl"])
def test_a_converter_that_fits_anew_loses_what_was_trained(ggml, name):
    """Why blocks are written directly: the same weights through C's quantizer are others."""
    weight = random_tensor(name, seed=3, rows=16, blocks=8).dequantize()
    packed = quantize_anew(ggml, weight, name)
    found = dequantize_blocks(ggml, packed, name, weight.numel()).view_as(weight)
    assert (found - weight).norm() > 0.001 * weight.norm()


@pytest.mark.parametrize(
    "plan", ["gguf:q2_0+gguf:q4_0", "gguf:iq4_nl+gguf:q8_0", "gguf:mxfp4+gguf:q5_1"]
)
def test_c_reads_our_files(ggml, tmp_path, plan):
    """Header, keys, tensor types and sizes, Q2_0 among them."""
    text_source = save_tiny(tmp_path / "base", tiny_llama())
    path = tmp_path / "out.gguf"
    export_to_gguf(tiny_student("llama", plan), path, text_source=text_source)

    class Parameters(ctypes.Structure):
        _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]

    file = ggml.gguf_init_from_file(str(path).encode(), Parameters(True, None))
    assert file
    records = read_tensor_records(path)
    assert ggml.gguf_get_n_tensors(ctypes.c_void_p(file)) == len(records)
    for name, record in records.items():
        kind = BLOCK_TYPES[record.type_name]
        place = ctypes.c_int64(ggml.gguf_find_tensor(ctypes.c_void_p(file), name.encode()))
        assert ggml.gguf_get_tensor_type(ctypes.c_void_p(file), place) == kind.number
        size = ggml.gguf_get_tensor_size(ctypes.c_void_p(file), place)
        count = torch.Size(record.shape).numel()
        assert size == count // kind.num_weights * kind.num_bytes
    ggml.gguf_free(ctypes.c_void_p(file))
