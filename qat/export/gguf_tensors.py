"""The tensors of a student as a GGUF file holds them, written and compared some rows at a time.

Neither the file nor a whole tensor of it is ever in memory: an embedding of 262,144 rows is most
of a small model.

Shape legend: O rows, I weights of a row, R rows of a chunk.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from qat.export.checks import equal_bits, require_equal_rows
from qat.export.gguf_family import FAMILIES, head_dim_of
from qat.export.gguf_file import ALIGNMENT, StoredTensor, read_bytes, read_tail
from qat.export.gguf_keys import PlannedTensor
from qat.grids.blocks import (
    DTYPES,
    pack_dense,
    pack_parts,
    quantize_q8_0,
    tail_of,
    unpack_blocks,
)
from qat.model.layers import FakeQuantWeight
from qat.model.surgery import quantized_tensor
from qat.quant.quantized_tensor import QuantizedTensor
from qat.quant.straight_through import Dequantize, fake_quantize

CHUNK_WEIGHTS = 2**20  # 4 MiB in float32; what measures rounding takes ten times as much


class TensorRows:
    """Rows of one tensor: the weights, and the bytes that the file gets, in the file's order."""

    def __init__(self, student: nn.Module, tensor: PlannedTensor):
        config, (owner_name, _, part) = student.config, tensor.source.rpartition(".")
        owner = student.get_submodule(owner_name)
        self.type_name = tensor.type_name
        self.order = row_order(config, tensor.source)
        self.layer = owner if isinstance(owner, FakeQuantWeight) and part == "weight" else None
        self.quantized: QuantizedTensor | None = None
        """None where the tensor goes through floats."""
        if self.layer is None:
            weight = student.get_parameter(tensor.source).detach()
            if weight.dim() == 1:  # one row, whose weights may have an order
                weight = weight if self.order is None else weight[self.order]
                weight, self.order = weight.view(1, -1), None
            is_norm = tensor.source.endswith("norm.weight")
            self.weight = weight
            self.added = FAMILIES[config.model_type].norm_offset if is_norm else 0.0
            self.shape = weight.shape
        else:
            self.scale, self.offset = self.layer.expand()
            self.shape = (self.layer.out_features, self.layer.in_features)
            if self.type_name not in DTYPES:
                self.quantized = quantized_tensor(self.layer)

    def chunks(self) -> Iterator[slice]:
        """Yield the rows of each chunk, counted as in the file."""
        step = max(1, CHUNK_WEIGHTS // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield slice(start, min(start + step, self.shape[0]))

    def places(self, rows: slice) -> slice | Tensor:
        """Return where the student has the file's rows."""
        return rows if self.order is None else self.order[rows]

    def weights(self, rows: slice) -> Tensor:
        """Return the weights that the student computes with, (R, I) float32."""
        at = self.places(rows)
        if self.layer is None:
            return self.weight[at].float() + self.added
        scale, offset = (None if t is None else t[at] for t in (self.scale, self.offset))
        codebook, grid = self.layer.stored_codebook(), self.layer.spec.grid
        if self.layer.latent_weight is None:
            indices = self.layer.indices[at]
            return Dequantize.apply(indices, scale, offset, codebook, grid, torch.float32)
        latent = self.layer.latent_weight[at]
        return fake_quantize(latent, scale, codebook, grid, offset=offset)

    def packed(self, rows: slice) -> Tensor:
        """Return the file's bytes, (R, bytes of a row) uint8."""
        if self.quantized is not None:  # indices become blocks with no float between
            at = self.places(rows)
            names = self.quantized.spec.scale.part_shapes(self.shape)
            parts = {name: self.quantized.parts[name][at] for name in names}
            return pack_parts(self.quantized.indices[at], parts, self.type_name)
        if self.type_name == "q8_0":
            return quantize_q8_0(self.weights(rows))
        return pack_dense(self.weights(rows), self.type_name)

    def tail(self) -> bytes:
        """Return the file's bytes behind the last row."""
        return b"" if self.quantized is None else tail_of(self.scale, self.type_name)

    def rounding(self, rows: slice, packed: Tensor) -> Tensor:
        """Return the power that a dense type rounds off rows, and their power, (2,) float64."""
        if self.quantized is not None:
            return torch.zeros(2, dtype=torch.float64)
        trained = self.weights(rows).double()
        kept = unpack_blocks(packed, self.type_name)
        return torch.stack([(kept - trained).square().sum(), trained.square().sum()])


@torch.no_grad()
def write_tensor(file: BinaryIO, student: nn.Module, tensor: PlannedTensor) -> float:
    """Append a tensor to a file; return what its type rounds off, as a share of its power."""
    reader, powers = TensorRows(student, tensor), torch.zeros(2, dtype=torch.float64)
    for rows in reader.chunks():
        packed = reader.packed(rows)
        powers += reader.rounding(rows, packed)
        file.write(packed.contiguous().numpy())
    file.write(reader.tail())
    pad_to_alignment(file)
    return float(powers[0] / powers[1].clamp_min(1e-300))


@torch.no_grad()
def compare_tensor(
    path: Path, record: StoredTensor, student: nn.Module, tensor: PlannedTensor
) -> None:
    """Refuse a tensor of a written file that is not the student's, bit for bit."""
    reader, tail = TensorRows(student, tensor), read_tail(path, record)
    for rows in reader.chunks():
        found = read_bytes(path, record, rows)
        if reader.quantized is not None:  # by the type's own definition, not by what packed it
            trained = reader.weights(rows)
            kept = unpack_blocks(found, record.type_name, tail)
            require_equal_rows(tensor.source, kept, trained)
        elif not equal_bits(found, reader.packed(rows)):
            raise ValueError(f"{tensor.source} reads back otherwise than it was written")


def pad_to_alignment(file: BinaryIO) -> None:
    """Append zeros up to where the next tensor begins."""
    file.write(bytes(-file.tell() % ALIGNMENT))


def row_order(config: PreTrainedConfig, source: str) -> Tensor | None:
    """Return the order of a tensor's rows in the file, (O,); None for their own.

    Some runtimes' heads turn neighbours together, transformers' halves of it: rows 0 and
    width / 2 of each head become neighbours. Codes and scales move with their rows.
    """
    part = source.split(".")[-2]
    if not FAMILIES[config.model_type].turns_neighbours or part not in ("q_proj", "k_proj"):
        return None
    heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
    order = torch.arange(heads * head_dim_of(config))
    return order.view(heads, 2, -1).transpose(1, 2).reshape(-1)
