"""Calls of ggml's C code and what is made of their answers; the code itself is in tests/parity."""

import ctypes

import pytest
import torch

from qat.export import ggml
from qat.grids.blocks import BLOCK_TYPES
from qat.quant.spec import K_FORMATS


class Recorder:
    """A library that writes down its calls and leaves weights of zeros."""

    def __init__(self):
        self.calls = []

    def ggml_quantize_chunk(self, kind, _weight, _packed, first, rows, columns, importance):
        self.calls.append((kind.value, first.value, rows.value, columns.value, importance))

    def __getattr__(self, name):
        def dequantize(_packed, found, count):
            self.calls.append(name)
            ctypes.memset(found.value, 0, 4 * count.value)

        return dequantize


def test_an_absent_library_is_refused_with_its_install_line(monkeypatch):
    """Before anything is loaded."""
    monkeypatch.setattr(ggml, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="pip install libggml-python"):
        ggml.open_ggml()


@pytest.mark.parametrize("name", ["q4_0", "q2_k", "iq3_s"])
def test_blocks_are_as_many_bytes_as_the_type_has(name):
    """The type's own number, whole rows, and no pointer where inputs count alike."""
    library, kind = Recorder(), BLOCK_TYPES[name]
    packed = ggml.quantize_anew(library, torch.randn(3, 512), name)
    assert packed.dtype == torch.uint8
    assert len(packed) == 3 * 512 // kind.num_weights * kind.num_bytes
    assert library.calls == [(kind.number, 0, 3, 512, None)]
    importance = torch.ones(512)
    ggml.quantize_anew(library, torch.randn(3, 512), name, importance)
    assert library.calls[1][-1].value == importance.data_ptr()


@pytest.mark.parametrize("name", [*K_FORMATS, "q8_0"])
def test_functions_have_the_names_of_c(name):
    """Whose K is a capital."""
    library = Recorder()
    found = ggml.dequantize_blocks(library, torch.zeros(999, dtype=torch.uint8), name, 256)
    assert torch.equal(found, torch.zeros(256))
    (called,) = library.calls
    assert called.removeprefix("dequantize_row_").lower() == name
    assert ("K" in called) == ("_k" in name)


@pytest.mark.parametrize("kind", ["even", "uniform", "steep"])
def test_errors_are_shares_of_the_weights_own_power(kind):
    """Weights of zeros are off by all of it, whatever counts; four bits by a hundredth."""
    importance = ggml.random_importance(kind, 64)
    assert importance.shape == (64,)
    assert (importance > 0).all()
    assert (kind == "even") == bool((importance == 1).all())
    ours, theirs = ggml.errors_of_both(Recorder(), torch.randn(8, 64), "q4_0", importance)
    assert theirs == pytest.approx(1)
    assert 0 < ours < 0.02
