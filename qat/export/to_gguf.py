"""A student as one GGUF file: its indices and scales as packed blocks, read back to the bit.

No converter and no re-quantization: those fit scales anew and lose up to half of a 2-bit layer.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedConfig

from qat.export.checks import (
    REPORT_NAME,
    equal_bits,
    require_codebook,
    require_equal,
    require_float16,
    require_replaceable,
    write_report,
)
from qat.export.gguf_file import read_bytes, read_tensor_records, read_weight
from qat.export.gguf_keys import architecture_of, head_dim_of, rope_factors, start_file
from qat.export.gguf_vocabulary import read_vocabulary
from qat.grids.blocks import (
    BLOCK_TYPES,
    DTYPES,
    pack_dense,
    pack_parts,
    quantize_q8_0,
    unpack_blocks,
)
from qat.grids.scalar import fits_float16
from qat.model.layers import FakeQuantWeight
from qat.model.load import load_tokenizer
from qat.model.surgery import quantized_layers, quantized_tensor
from qat.quant.spec import TensorSpec, gguf_type_of
from qat.storage.files import atomic_file

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE_NAME = "model.gguf"  # in a folder
SUFFIX = ".gguf"
TYPE_OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
HEADS = ("model.embed_tokens.weight", "lm_head.weight")
ROPE_FACTORS = "rope_freqs.weight"


class PlannedTensor(NamedTuple):
    """One tensor of the file to be: where it comes from, its name and type there."""

    source: str
    name: str
    type_name: str


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
        writer = start_file(temporary, student.config, vocabulary, main_file_type(plan))
        num_rounded, head_sqnr_db = write_tensors(writer, student, plan)
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
        plan.append(PlannedTensor(source, names[source], type_name))
    return plan


def file_names(config: PreTrainedConfig, sources: Iterable[str]) -> dict[str, str]:
    """Return the name in the file of each of a model's tensors; refuse one without."""
    import gguf

    architecture = architecture_of(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], config.num_hidden_layers)
    found = {source: names.get_name(source, (".weight", ".bias")) for source in sources}
    for source, name in found.items():
        if name is None:
            raise ValueError(f"{source} has no name in {architecture} files; export --to hf")
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


def main_file_type(plan: list[PlannedTensor]) -> int:
    """Return the file type of what most matrices of the blocks are."""
    types = [t.type_name for t in plan if t.source not in HEADS and t.type_name != "f32"]
    types = types or [t.type_name for t in plan]
    return BLOCK_TYPES[max(sorted(set(types)), key=types.count)].file_type


@torch.no_grad()
def write_tensors(
    writer: "GGUFWriter", student: nn.Module, plan: list[PlannedTensor]
) -> tuple[int, float | None]:
    """Add every tensor and close the file; return how many are rounded, and the head's SQNR."""
    num_rounded, head_sqnr_db = 0, None
    factors = rope_factors(student.config)
    if factors is not None:
        writer.add_tensor(ROPE_FACTORS, factors.numpy())
    for tensor in tqdm(plan, desc="gguf", unit="tensor"):
        packed = packed_bytes(student, tensor)
        noise = noise_ratio(student, tensor, packed)
        num_rounded += noise > 0
        if tensor.source in HEADS and noise > 0:
            head_sqnr_db = round(-10 * math.log10(noise), 2)
        ordered = in_file_order(packed, row_order(student.config, tensor.source))
        number = BLOCK_TYPES[tensor.type_name].number
        writer.add_tensor(tensor.name, ordered.numpy(), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return num_rounded, head_sqnr_db


def is_packed(student: nn.Module, tensor: PlannedTensor) -> bool:
    """Return whether a tensor goes from indices to blocks, with no float between."""
    is_layer = isinstance(student.get_submodule(layer_name(tensor)), FakeQuantWeight)
    is_weight = tensor.source.endswith(".weight")
    return is_layer and is_weight and tensor.type_name not in DTYPES


def float_tensor(student: nn.Module, tensor: PlannedTensor) -> Tensor:
    """Return a tensor of the student in float32; of a quantized layer the weight it computes."""
    owner = student.get_submodule(layer_name(tensor))
    if isinstance(owner, FakeQuantWeight) and tensor.source.endswith(".weight"):
        return owner.fake_quantized_weight()
    return student.get_parameter(tensor.source).detach().float()


def packed_bytes(student: nn.Module, tensor: PlannedTensor) -> Tensor:
    """Return a tensor's bytes, rows in the student's order."""
    if is_packed(student, tensor):
        quantized = quantized_tensor(student.get_submodule(layer_name(tensor)))
        return pack_parts(quantized.indices, quantized.parts, tensor.type_name)
    if tensor.type_name == "q8_0":
        return quantize_q8_0(float_tensor(student, tensor))
    return pack_dense(float_tensor(student, tensor), tensor.type_name)


def noise_ratio(student: nn.Module, tensor: PlannedTensor, packed: Tensor) -> float:
    """Return what its type rounds off a dense tensor, as a share of its power."""
    if is_packed(student, tensor):
        return 0.0
    trained = float_tensor(student, tensor).double()
    kept = unpack_blocks(packed.view(-1, packed.shape[-1]), tensor.type_name).view_as(trained)
    return float((kept - trained).square().sum() / trained.square().sum().clamp_min(1e-300))


def row_order(config: PreTrainedConfig, source: str) -> Tensor | None:
    """Return the order of a tensor's rows in the file, (O,); None for their own.

    Runtimes turn neighbours of a llama head together, transformers halves of it: rows 0 and
    width / 2 of each head become neighbours. Codes and scales move with their rows.
    """
    part = source.split(".")[-2]
    if config.model_type != "llama" or part not in ("q_proj", "k_proj"):
        return None
    heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
    order = torch.arange(heads * head_dim_of(config))
    return order.view(heads, 2, -1).transpose(1, 2).reshape(-1)


def in_file_order(packed: Tensor, order: Tensor | None) -> Tensor:
    """Return a tensor's bytes with its rows in the file's order; biases are f32."""
    if order is None:
        return packed
    rows = packed if packed.dim() > 1 else packed.view(-1, 4)
    return rows[order].view(packed.shape)


@torch.no_grad()
def compare_with_file(student: nn.Module, plan: list[PlannedTensor], path: Path) -> int:
    """Return the number of tensors in a written file, each equal to the student's."""
    records = read_tensor_records(path)
    extra = {ROPE_FACTORS} if rope_factors(student.config) is not None else set()
    if odd := records.keys() ^ ({tensor.name for tensor in plan} | extra):
        raise ValueError(f"{min(odd)} is in the plan or in the file only; nothing was written")
    for tensor in tqdm(plan, desc="compared", unit="tensor"):
        record, order = records[tensor.name], row_order(student.config, tensor.source)
        if is_packed(student, tensor):
            found = read_weight(path, record)
            found = found if order is None else found[order.argsort()]
            require_equal(layer_name(tensor), found, student.get_submodule(layer_name(tensor)))
            continue
        expected = in_file_order(packed_bytes(student, tensor), order)
        if not equal_bits(read_bytes(path, record).view(-1), expected.view(-1)):
            raise ValueError(f"{tensor.source} reads back otherwise than it was written")
    return len(plan)


def layer_name(tensor: PlannedTensor) -> str:
    """Return the name of the module that a tensor belongs to."""
    return tensor.source.rpartition(".")[0]
