"""ggml's own C quantizers, to measure what fitting anew makes of a trained weight.

From `libggml-python`, which `make parity` installs. Exporters never call them.
"""

import ctypes
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from qat.grids.blocks import BLOCK_TYPES


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
