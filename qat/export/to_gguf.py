"""A student as one GGUF file: its indices and scales as packed blocks, read back to the bit.

No converter and no re-quantization: those fit scales anew and lose up to half of a 2-bit layer.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedConfig

from qat.export.checks import (
    REPORT_NAME,
    require_codebook,
    require_float16,
    require_replaceable,
    write_report,
)
from qat.export.gguf_family import require_family
from qat.export.gguf_file import read_tensor_records
from qat.export.gguf_keys import HEADS, PlannedTensor, rope_tensors, write_head
from qat.export.gguf_tensors import compare_tensor, pad_to_alignment, write_tensor
from qat.export.gguf_vocabulary import read_vocabulary
from qat.grids.blocks import BLOCK_TYPES
from qat.grids.scalar import fits_float16
from qat.model.load import load_tokenizer
from qat.model.surgery import quantized_layers
from qat.quant.spec import TensorSpec, gguf_type_of
from qat.storage.files import atomic_file

FILE_NAME = "model.gguf"  # in a folder
SUFFIX = ".gguf"
TYPE_OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def export_to_gguf(
    student: nn.Module,
    output: Path,
    *,
    text_source: Path,
    dtype: torch.dtype | None = None,
    head: str = "f16",
) -> dict[str, Any]:
    """Write a student as a GGUF file that llama.cpp and its kin run.

    Args:
        student: As in every export, like text_source.
        output: A path ending in .gguf, or else a folder that gets model.gguf.
        text_source: A folder.
        dtype: Write dense weights in it, for any student; None writes the packed blocks of the
            grids that the student was trained on.
        head: Type of embeddings and head: f16, bf16, f32 or q8_0.
    """
    plan = plan_tensors(student, dtype, head)
    vocabulary = read_vocabulary(load_tokenizer(text_source), student.config.vocab_size)
    file_path = output if output.suffix == SUFFIX else output / FILE_NAME
    require_replaceable(file_path.parent / REPORT_NAME)
    with atomic_file(file_path) as temporary:
        write_head(temporary, student.config, vocabulary, plan)
        num_rounded, head_sqnr_db = write_tensors(temporary, student, plan)
        compared = compare_with_file(student, plan, temporary)
    return write_report(
        file_path.parent,
        output,
        file=file_path.name,
        compared=compared,
        rounded=num_rounded,
        file_bytes=file_path.stat().st_size,
        head={"type": head_type(dtype, head), "sqnr_db": head_sqnr_db},
    )


def head_type(dtype: torch.dtype | None, head: str) -> str:
    """Return the type of embeddings and head: a whole file in one dtype has no other."""
    return head if dtype is None else TYPE_OF_DTYPE[dtype]


def plan_tensors(student: nn.Module, dtype: torch.dtype | None, head: str) -> list[PlannedTensor]:
    """Return what the file will hold, after refusing what it cannot."""
    layers = quantized_layers(student)
    if not layers and dtype is None:
        raise ValueError("the checkpoint has no quantized layer; give --dtype for a dense file")
    tensors = sources(student)
    names = file_names(student.config, tensors)
    plan = []
    for source, tensor in tensors.items():
        layer = layers.get(source.removesuffix(".weight"))
        if layer is None or dtype is not None:
            type_name = dense_type(source, tensor, dtype, head)
        else:
            type_name = require_type(source, layer.spec)
            require_codebook(source, layer)
            require_float16(source, layer)
        shape = (layer.out_features, layer.in_features) if tensor is None else tuple(tensor.shape)
        plan.append(PlannedTensor(source, names[source], type_name, shape))
    return plan


def file_names(config: PreTrainedConfig, sources: Iterable[str]) -> dict[str, str]:
    """Return the name in the file of each of a model's tensors; refuse one without."""
    import gguf

    family = require_family(config, sources)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.name], config.num_hidden_layers)
    found = {source: names.get_name(source, (".weight", ".bias")) for source in sources}
    for source, name in found.items():
        if name is None:
            raise ValueError(f"{source} has no name in {family.name} files; export --to hf")
    return found


def sources(student: nn.Module) -> dict[str, Tensor | None]:
    """Return the tensors that a file holds by name, a tied head left out.

    Quantized weights stand as None: they are formed one at a time.
    """
    layers = quantized_layers(student)
    found: dict[str, Tensor | None] = {}
    for key, tensor in student.named_parameters():  # names what is tied once
        owner, _, part = key.rpartition(".")
        if owner in layers and part != "bias":
            found[f"{owner}.weight"] = None
        else:
            found[key] = tensor
    return found


def dense_type(source: str, tensor: Tensor | None, dtype: torch.dtype | None, head: str) -> str:
    """Return the type of a dense tensor: vectors in f32, as kernels add them; matrices as asked."""
    if tensor is not None and tensor.dim() == 1:
        return "f32"
    type_name = head_type(dtype, head)
    if type_name in ("f16", "q8_0") and tensor is not None and not fits_float16(tensor):
        raise ValueError(f"{source} holds NaN or values beyond float16; use --head bf16")
    block = BLOCK_TYPES[type_name].num_weights
    if tensor is not None and tensor.shape[-1] % block:
        raise ValueError(
            f"{source} has rows of {tensor.shape[-1]} weights, {type_name} blocks of {block}; "
            "use --head f16"
        )
    return type_name


def require_type(source: str, spec: TensorSpec) -> str:
    """Return the type that holds a tensor's format exactly; refuse if none does."""
    type_name = gguf_type_of(spec)
    if type_name is None:
        raise ValueError(
            f"{source} is on no grid of GGUF ({spec.name}); convert it first "
            "(`qat convert --plan gguf:q4_0`), or write it dense with --dtype fp16"
        )
    return type_name


def write_tensors(
    path: Path, student: nn.Module, plan: list[PlannedTensor]
) -> tuple[int, float | None]:
    """Append all tensors to a file's head; return how many are rounded, and the head's SQNR."""
    num_rounded, head_sqnr_db = 0, None
    with path.open("ab") as file:
        pad_to_alignment(file)
        for tensor in tqdm(plan, desc="gguf", unit="tensor"):
            noise = write_tensor(file, student, tensor)
            num_rounded += noise > 0
            if tensor.source in HEADS and noise > 0:
                head_sqnr_db = round(-10 * math.log10(noise), 2)
        for factors in rope_tensors(student.config).values():
            file.write(factors.numpy())
            pad_to_alignment(file)
    return num_rounded, head_sqnr_db


def compare_with_file(student: nn.Module, plan: list[PlannedTensor], path: Path) -> int:
    """Return the number of tensors in a written file, each equal to the student's."""
    records = read_tensor_records(path)
    expected = {tensor.name for tensor in plan} | rope_tensors(student.config).keys()
    if odd := records.keys() ^ expected:
        raise ValueError(f"{min(odd)} is in the plan or in the file only; nothing was written")
    for tensor in tqdm(plan, desc="compared", unit="tensor"):
        compare_tensor(path, records[tensor.name], student, tensor)
    return len(plan)
