"""What was written is read as the `gguf` package reads it."""

import struct
from contextlib import nullcontext, suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.export.gguf_file import (
    read_bytes,
    read_header,
    read_tensor_records,
    read_weight,
    require_vocabulary,
)
from qat.export.to_gguf import export_to_gguf
from qat.grids.blocks import BLOCK_TYPES
from tests.tiny import tiny_student

gguf = pytest.importorskip("gguf")


def export(student, tmp_path, text_source, **options):
    return export_to_gguf(student, tmp_path / "out.gguf", text_source=text_source, **options)


def test_our_reader_agrees_with_the_package(tmp_path, text_source):
    """Types, shapes and bytes of every tensor."""
    export(tiny_student("llama", "gguf:q4_0"), tmp_path, text_source)
    records = read_tensor_records(tmp_path / "out.gguf")
    for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        record = records.pop(tensor.name)
        assert record.shape == tuple(reversed(tensor.shape.tolist()))
        assert BLOCK_TYPES[record.type_name].number == tensor.tensor_type
        found = read_bytes(tmp_path / "out.gguf", record).numpy()
        assert np.array_equal(found.reshape(-1), tensor.data.view(np.uint8).reshape(-1))
    assert not records


def test_a_cut_file_is_no_gguf_file(tmp_path, text_source):
    """The reader says so instead of giving fewer numbers."""
    export(tiny_student("llama", "gguf:q4_0"), tmp_path, text_source)
    path = tmp_path / "out.gguf"
    last = list(read_tensor_records(path).values())[-1]
    path.write_bytes(path.read_bytes()[: last.offset + 3])
    with pytest.raises(ValueError, match="ends before its last tensor"):
        read_bytes(path, last)
    path.write_bytes(b"GGML" + path.read_bytes()[4:])
    with pytest.raises(ValueError, match="no GGUF file of version 3"):
        read_tensor_records(path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """Return a file of a key of each kind and two tensors."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_layer_norm_rms_eps(0.5)
    writer.add_token_list(["a", "bc"])
    writer.add_array("x.numbers", [1, 2, 3])
    writer.add_add_bos_token(True)
    writer.add_custom_alignment(64)
    writer.add_tensor("a", np.ones((2, 3), dtype=np.float32))
    writer.add_tensor("b", np.ones((1, 64), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_keys_with_one_value_are_read_and_lists_passed_over(small_file):
    """An alignment other than the default moves the data."""
    keys, lists, tensors = read_header(small_file)
    assert keys["general.architecture"] == "llama"
    assert keys["llama.block_count"] == 3
    assert keys["llama.attention.layer_norm_rms_epsilon"] == 0.5
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert lists == {"tokenizer.ggml.tokens": (8, 2, 2), "x.numbers": (5, 3, 0)}
    assert read_weight(small_file, tensors["a"]).tolist() == [[1.0] * 3] * 2
    assert read_weight(small_file, tensors["b"]).tolist() == [[1.0] * 64]


@pytest.mark.parametrize(
    ("add", "told"),
    [
        (lambda w: w.add_token_scores([0.5]), "1 scores of type 6 for 2 tokens"),
        (lambda w: w.add_token_types([1, 1, 1]), "3 token_type of type 5 for 2 tokens"),
        (lambda w: w.add_array("tokenizer.ggml.merges", [1]), "1 merges of type 5"),
        (lambda w: w.add_array("tokenizer.ggml.scores", [1, 1]), "2 scores of type 5"),
        (lambda w: w.add_eos_token_id(2), "eos_token_id is 2, of 2 tokens"),
    ],
)
def test_a_vocabulary_of_uneven_lists_is_refused(tmp_path, add, told):
    """llama.cpp takes a score and a type of each token without asking how many there are."""
    path = tmp_path / "v.gguf"
    for is_odd in (False, True):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_token_list(["a", "bc"])
        if is_odd:
            add(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        refusal = pytest.raises(ValueError, match=told) if is_odd else nullcontext()
        with refusal:
            require_vocabulary(path, read_header(path))


def test_a_token_that_is_there_twice_is_refused(tmp_path):
    """llama.cpp ends the process on it."""
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_token_list(["a", "bc", "a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"2 different tokens among 3; make it again"):
        require_vocabulary(tmp_path / "v.gguf", read_header(tmp_path / "v.gguf"))


@pytest.mark.parametrize("offset", [0, 32, 63, 2**63])
def test_tensors_lie_side_by_side(small_file, offset):
    """A native runtime is not trusted to notice that two share bytes, or lie askew."""
    data = bytearray(small_file.read_bytes())
    record = data.index(struct.pack("<Q", 1) + b"b") + 9  # of the second tensor
    sides = struct.unpack_from("<I", data, record)[0]
    struct.pack_into("<Q", data, record + 4 + 8 * sides + 4, offset)
    damaged = small_file.with_name("askew.gguf")
    damaged.write_bytes(data)
    with pytest.raises(ValueError, match="b overlaps|between two places|ends before"):
        read_header(damaged)


@pytest.mark.recipe
@given(place=st.integers(0, 700), value=st.binary(min_size=1, max_size=9), cut=st.booleans())
@settings(max_examples=120, deadline=None)
def test_a_damaged_file_is_read_or_refused(small_file, place, value, cut):
    """Whatever bytes are changed or cut off: no other error, no memory for what is not there."""
    data = bytearray(small_file.read_bytes())
    place %= len(data)
    data[place : place + len(value)] = value
    damaged = small_file.with_name("damaged.gguf")
    damaged.write_bytes(data[: place if cut else None])
    with suppress(ValueError):
        for record in read_header(damaged).tensors.values():
            read_weight(damaged, record)


@pytest.mark.parametrize("name", ["Q3_K", "Q6_K", "IQ3_XXS", "IQ1_M", "TQ1_0", "MXFP4", "Q5_1"])
def test_types_that_only_others_write_are_read_by_the_package(tmp_path, name):
    """From any bytes: those are blocks of some weights."""
    kind = gguf.GGMLQuantizationType[name]
    _, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    packed = np.random.default_rng(0).integers(0, 256, (3, 2 * num_bytes), dtype=np.uint8) & 0xBF
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    record = read_tensor_records(tmp_path / "x.gguf")["x"]
    expected = gguf.dequantize(packed, kind)
    assert np.array_equal(
        read_weight(tmp_path / "x.gguf", record).numpy(), expected, equal_nan=True
    )
