"""What every export checks, before it writes and after, and the report next to the file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.grids.scalar import fits_float16
from qat.model.layers import FakeQuantWeight
from qat.storage.decode import object_in
from qat.storage.files import write_json

REPORT_NAME = "export.json"


def require_codebook(name: str, layer: FakeQuantWeight) -> None:
    """Refuse a layer whose codebook moved off the values of its grid."""
    expected = layer.spec.grid.start_codebook()
    if expected is not None and not torch.equal(layer.codebook.detach(), expected):
        raise ValueError(
            f"{name}: its codebook was trained away from the format's values; "
            "train without --trainable codebooks"
        )


@torch.no_grad()
def require_float16(name: str, layer: FakeQuantWeight) -> None:
    """Refuse a layer with a scale that float16 does not hold."""
    for part in layer.spec.scale.part_shapes((layer.out_features, layer.in_features)):
        scale = layer.spec.snap_part(part, getattr(layer, part))
        if not fits_float16(scale) or not torch.equal(scale.half().float(), scale):
            worst = float(scale.abs().max())
            raise ValueError(
                f"{name}: scale {worst:.6g} is outside float16; train with a lower rate"
            )


def equal_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors agree in shape, dtype and every bit."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    first, second = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (first, second))
    return torch.equal(first, second)


def equal_weights(first: Tensor, second: Tensor) -> bool:
    """Return whether two weights agree in every bit, a zero's sign apart.

    Formats that count from another end (-d * 0 instead of d * 0) turn it; no product sees it.
    """
    return equal_bits(first + 0.0, second + 0.0)


def require_equal(name: str, found: Tensor, layer: FakeQuantWeight) -> None:
    """Refuse a weight read back, (O, I) float32, of which a bit is not the trained one."""
    with torch.no_grad():
        require_equal_rows(f"{name}.weight", found, layer.fake_quantized_weight())


def require_equal_rows(source: str, found: Tensor, trained: Tensor) -> None:
    """Refuse a weight read back, or some rows of it, of which a bit is not the trained one."""
    if not equal_weights(found, trained):
        differing = "its shape" if found.shape != trained.shape else int((found != trained).sum())
        raise ValueError(
            f"{source} reads back otherwise than it was trained ({differing} of "
            f"{trained.numel()} weights); nothing was written, report this with export.json's keys"
        )


def require_replaceable(path: Path) -> None:
    """Refuse to overwrite a file that is no report of an export."""
    if path.exists() and "tensors_compared" not in object_in(path):
        raise ValueError(f"{path} exists and is no export's report; export into another folder")


def write_report(
    folder: Path, output: Path, *, compared: int, rounded: int, **others: object
) -> dict[str, Any]:
    """Write the report of an export into a folder and return it.

    Args:
        folder: Where the files are.
        output: Where they will be.
        compared: Tensors read back, each equal to the student's.
        rounded: Tensors that their dtype does not hold as trained.
        others: What else a format tells.
    """
    counts = {"tensors_compared": compared, "tensors_rounded": rounded}
    report = {"path": str(output), "exact": True, **counts, **others}
    write_json(folder / REPORT_NAME, report)
    return report


def bytes_below(path: Path) -> int:
    """Return the size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
