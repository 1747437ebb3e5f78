"""Fits in every GGUF format, dequantized by ggml's own C code and against its quantizer."""

from importlib.util import find_spec

import pytest
import torch

from qat.export.ggml import dequantize_blocks, errors_of_both, open_ggml, random_importance
from qat.grids.blocks import TAILED, pack_parts
from qat.quant.fit import fit_weight
from qat.quant.spec import FORMATS

pytestmark = pytest.mark.parity

NAMES = [name.removeprefix("gguf:") for name in FORMATS if name.startswith("gguf:")]
NAMES = [name for name in NAMES if name not in TAILED]  # which llama.cpp lacks
# Largest share of C's error: all but optimal scales of even importances leave no more to win.
BOUNDS = {"even": 0.99, "uniform": 0.985, "steep": 0.93}


@pytest.fixture(scope="module")
def ggml():
    """Return libggml's base library."""
    if find_spec("libggml") is None:
        pytest.skip("libggml-python is not installed; `make parity` installs it")
    return open_ggml()


@pytest.mark.parametrize("name", NAMES)
def test_c_gives_the_weights_of_the_fit(ggml, name):
    """To the bit."""
    weight, importance = torch.randn(16, 1024) * 0.02, random_importance("steep", 1024)
    quantized = fit_weight(weight, FORMATS[f"gguf:{name}"], importance=importance)
    packed = pack_parts(quantized.indices, quantized.parts, name)
    found = dequantize_blocks(ggml, packed, name, weight.numel()).view_as(weight)
    assert torch.equal(found, quantized.dequantize())


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_fit_beats_that_of_c(ggml, name, kind):
    """By the error that both weigh by the same importances."""
    weight = torch.randn(64, 1024) * 0.02
    ours, theirs = errors_of_both(ggml, weight, name, random_importance(kind, 1024))
    assert ours < BOUNDS[kind] * theirs
