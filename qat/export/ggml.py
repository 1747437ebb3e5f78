"""ggml's own C quantizers, to measure what fitting anew makes of a trained weight.

From `libggml-python`, which `make parity` installs. Exporters never call them.
"""

import ctypes
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from qat.grids.blocks import BLOCK_TYPES
from qat.quant.fit import fit_weight
from qat.quant.spec import FORMATS


def open_ggml() -> ctypes.CDLL:
    """Return libggml's base library; refuse where it is not installed."""
    found = find_spec("libggml")
    if found is None:
        raise ValueError("libggml-python is not installed; pip install libggml-python")
    folder = Path(found.submodule_search_locations[0])
    library = ctypes.CDLL(str(next(folder.glob("lib*/libggml-base.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def quantize_anew(
    library: ctypes.CDLL, weight: Tensor, type_name: str, importance: Tensor | None = None
) -> Tensor:
    """Return the blocks that C fits to a contiguous weight, (O, I) float32, as flat uint8.

    Types below 3 bits need an importance of each input, (I,) float32.
    """
    kind = BLOCK_TYPES[type_name]
    num_bytes = weight.numel() // kind.num_weights * kind.num_bytes
    packed = torch.empty(num_bytes, dtype=torch.uint8)
    library.ggml_quantize_chunk(
        ctypes.c_int(kind.number),
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_void_p(packed.data_ptr()),
        ctypes.c_int64(0),
        ctypes.c_int64(weight.shape[0]),
        ctypes.c_int64(weight.shape[1]),
        None if importance is None else ctypes.c_void_p(importance.data_ptr()),
    )
    return packed


def dequantize_blocks(
    library: ctypes.CDLL, packed: Tensor, type_name: str, num_weights: int
) -> Tensor:
    """Return what C makes of blocks, (num_weights,) float32."""
    packed, found = packed.contiguous(), torch.empty(num_weights)
    name = type_name.replace("_k", "_K")
    getattr(library, f"dequantize_row_{name}")(
        ctypes.c_void_p(packed.data_ptr()),
        ctypes.c_void_p(found.data_ptr()),
        ctypes.c_int64(num_weights),
    )
    return found


def random_importance(kind: str, num_inputs: int) -> Tensor:
    """Return how much each input counts, (I,): even, uniform between bounds, or steep."""
    return {
        "even": torch.ones(num_inputs),
        "uniform": torch.rand(num_inputs) * 2 + 0.1,
        "steep": torch.randn(num_inputs).exp().square(),
    }[kind]


def errors_of_both(
    library: ctypes.CDLL, weight: Tensor, type_name: str, importance: Tensor
) -> tuple[float, float]:
    """Return the weighted squared errors of our fit and of C's, over the weights' own.

    Args:
        library: libggml.
        weight: (O, I), float32.
        type_name: Of GGUF.
        importance: (I,), that both weigh by.
    """
    packed = quantize_anew(library, weight, type_name, importance)
    theirs = dequantize_blocks(library, packed, type_name, weight.numel()).view_as(weight)
    ours = fit_weight(weight, FORMATS[f"gguf:{type_name}"], importance=importance).dequantize()
    power = (weight.square() * importance).sum()
    ours, theirs = (
        float(((found - weight).square() * importance).sum() / power) for found in (ours, theirs)
    )
    return ours, theirs
