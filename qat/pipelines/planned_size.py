"""The bytes of the file that an allocation comes to, for each target of export."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qat.export.gguf_file import ALIGNMENT
from qat.export.gguf_size import planned_file_bytes
from qat.model.surgery import model_tensors
from qat.quant.allocate import Allocation
from qat.quant.plan import QuantPlan, TensorInfo
from qat.quant.spec import F16, FORMATS, TensorSpec
from qat.quant.targets import other_spec, tied_groups

# Of a folder: config, generation config, export report, and each tensor's entry in the header.
FOLDER_BYTES, ENTRY_BYTES = 16_384, 160
ENTRIES = 4  # of a quantized weight at most: indices, scales, offsets, shape
TEXT_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSize:
    """What a file of a target holds beside the weights that are allocated."""

    target: str
    tensors: Mapping[str, TensorInfo]
    """Every parameter of the model."""
    overhead_bytes: int
    """Header, tokenizer, keys, and tensors that stay dense."""
    dense_bytes: int = 2
    """Of a weight that stays dense: folders keep the dtype that loses nothing."""

    @classmethod
    def of(cls, target: str, model: nn.Module, folder: Path) -> "PlannedSize":
        """Measure a model without weights; refuse one that the target cannot hold."""
        tensors = model_tensors(model)
        dense = {name: i for name, i in tensors.items() if not i.is_quantizable}
        if target == "gguf":
            plan = all_dense(tensors)
            whole = planned_file_bytes(model.config, plan, text_source=folder)
            weights = [
                plan.specs[n].size_bytes(i.shape) for n, i in tensors.items() if n not in dense
            ]
            return cls(
                target=target,
                tensors=tensors,
                overhead_bytes=whole - sum(-(-one // ALIGNMENT) * ALIGNMENT for one in weights),
            )
        texts = [path for path in folder.iterdir() if path.name.startswith(TEXT_FILES)]
        entries = ENTRY_BYTES * ENTRIES * len(tensors)
        sizes = sum(4 * math.prod(info.shape) for info in dense.values())
        text_bytes = sum(path.stat().st_size for path in texts)
        overhead = FOLDER_BYTES + entries + sizes + text_bytes
        return cls(
            target=target,
            tensors=tensors,
            overhead_bytes=overhead,
            dense_bytes=4 if model.config.dtype == torch.float32 else 2,
        )

    @property
    def num_weights(self) -> int:
        """Number of parameters."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    def tensor_bytes(self, name: str, spec: TensorSpec) -> int:
        """Return the bytes that the file holds for a tensor in a format, padding among them."""
        shape = self.tensors[name].shape
        if self.target != "gguf" and not spec.is_quantized:
            return self.dense_bytes * math.prod(shape)
        if self.target == "mlx" and not spec.scale.exact_top:
            # Scales and offsets in float32, in which index * scale + offset rounds as in training.
            spec = spec.stored_as("float32")
        count = spec.size_bytes(shape)
        return -(-count // ALIGNMENT) * ALIGNMENT if self.target == "gguf" else count

    def file_bytes(self, allocation: Allocation) -> int:
        """Return the bytes of the whole file."""
        return self.overhead_bytes + allocation.num_bytes

    def plan(self, allocation: Allocation) -> QuantPlan:
        """Return the plan of an allocation."""
        specs = {name: other_spec(info.shape) for name, info in self.tensors.items()}
        quantizable = [name for name, info in self.tensors.items() if info.is_quantizable]
        for group in tied_groups(self.target, quantizable):
            chosen = TensorSpec.from_name(allocation.choices[group[0]].spec)
            specs |= dict.fromkeys(group, chosen)
        name = f"{self.target} of {self.file_bytes(allocation):,} bytes"
        shapes = {name: info.shape for name, info in self.tensors.items()}
        return QuantPlan(name=name, specs=specs, shapes=shapes)


def all_dense(tensors: Mapping[str, TensorInfo]) -> QuantPlan:
    """Return the plan that quantizes nothing."""
    specs = {name: FORMATS["f32"] if len(i.shape) < 2 else F16 for name, i in tensors.items()}
    shapes = {name: info.shape for name, info in tensors.items()}
    return QuantPlan(name="dense", specs=specs, shapes=shapes)
