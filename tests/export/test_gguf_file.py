"""What was written is read as the `gguf` package reads it."""

import numpy as np
import pytest

from qat.export.gguf_file import read_bytes, read_tensor_records
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
