"""llama.cpp's own quantizer: what it is given, and what is said where it is not there."""

import struct

import pytest
import torch

from qat.export import llama_quantize


def test_an_importance_matrix_holds_every_entry(tmp_path):
    """Read back by the form's own words: counts, names, sums of a number of calls."""
    moments = {"blk.0.attn_q.weight": torch.tensor([1.5, 2.5]), "é": torch.tensor([0.25])}
    path = tmp_path / "importance.dat"
    llama_quantize.write_importance_matrix(path, moments)
    raw, found = path.read_bytes(), {}
    (count,), place = struct.unpack_from("<i", raw), 4
    for _ in range(count):
        (length,), place = struct.unpack_from("<i", raw, place), place + 4
        name, place = raw[place : place + length].decode(), place + length
        (calls, size), place = struct.unpack_from("<ii", raw, place), place + 8
        sums = struct.unpack_from(f"<{size}f", raw, place)
        found[name], place = [one / calls for one in sums], place + 4 * size
    assert place == len(raw)
    assert found == {"blk.0.attn_q.weight": [1.5, 2.5], "é": [0.25]}


def test_a_missing_program_is_named_with_its_remedy(monkeypatch):
    """What to install is said."""
    monkeypatch.setattr(llama_quantize, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="pip install ik-llama-cpp-python"):
        llama_quantize.find_quantizer()
