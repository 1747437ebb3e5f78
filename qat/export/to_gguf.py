"""A student as one GGUF file: its indices and scales as packed blocks, read back to the bit.

No converter and no re-quantization: those fit scales anew and lose up to half of a 2-bit layer.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

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
from qat.export.gguf_vocabulary import Vocabulary, read_vocabulary
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

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}  # model_type to gguf's name
FILE_NAME = "model.gguf"  # in a folder
SUFFIX = ".gguf"
QUANTIZATION_VERSION = 2
TYPE_OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
HEADS = ("model.embed_tokens.weight", "lm_head.weight")
ROPE_FACTORS = "rope_freqs.weight"
# Runtimes refuse a file without merges. This one, of two zero bytes, changes no text: what it
# makes is no token, so it falls back to the bytes.
NO_MERGES = ["\u0100 \u0100"]


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
        student: On the CPU, in float32.
        output: A path ending in .gguf, or else a folder that gets model.gguf; must not exist.
        text_source: Folder of the tokenizer.
        dtype: Write dense weights in it, for any student; None writes the packed blocks of the
            grids that the student was trained on.
        head: Type of embeddings and head: f16, bf16, f32 or q8_0.

    Returns:
        path, exact (every quantized weight in the file is the trained one, bit for bit),
        tensors_compared, tensors_rounded (dense ones that their type does not hold as trained),
        file_bytes, and what the head's type costs.

    Raises:
        ValueError: If the model family, the tokenizer, a layer's grid or a value has no place in
            the format, before anything is written; or if a tensor reads back otherwise.
    """
    architecture = architecture_of(student.config)
    plan = plan_tensors(student, architecture, dtype, head)
    vocabulary = read_vocabulary(load_tokenizer(text_source), student.config.vocab_size)
    file_path = output if output.suffix == SUFFIX else output / FILE_NAME
    require_replaceable(file_path.parent / REPORT_NAME)
    with atomic_file(file_path) as temporary:
        writer = start_file(temporary, student.config, vocabulary, plan)
        sums = write_tensors(writer, student, plan)
        compared = compare_with_file(student, plan, temporary)
    report = {
        "path": str(output),
        "file": file_path.name,
        "exact": True,
        "tensors_compared": compared,
        "tensors_rounded": sums["rounded"],
        "file_bytes": file_path.stat().st_size,
        "head": {"type": head_type(dtype, head), "sqnr_db": sums["head_sqnr_db"]},
    }
    write_report(file_path.parent, report)
    return report


def architecture_of(config: PreTrainedConfig) -> str:
    """Return the `gguf` package's name of a model family.

    Raises:
        ValueError: If the family, its activation or its positions have no place in the format.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"model type {kind} has no tensor map here; gguf is written for "
            f"{', '.join(ARCHITECTURES)}: export --to hf and use the runtime's own converter"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"runtimes compute {kind} with silu, the model has {config.hidden_act}")
    rope = config.rope_parameters["rope_type"]
    if rope not in ("default", "linear", "yarn", "llama3"):
        raise ValueError(f"rope type {rope} has no GGUF key here; export --to hf")
    return ARCHITECTURES[kind]


def head_type(dtype: torch.dtype | None, head: str) -> str:
    """Return the type of embeddings and head: a whole file in one dtype has no other."""
    return head if dtype is None else TYPE_OF_DTYPE[dtype]


def plan_tensors(
    student: nn.Module, architecture: str, dtype: torch.dtype | None, head: str
) -> list[PlannedTensor]:
    """Return what the file will hold, after refusing what it cannot.

    Raises:
        ValueError: If a layer is on no grid of a GGUF type, or a value is beyond its type.
    """
    layers = quantized_layers(student)
    if not layers and dtype is None:
        raise ValueError("the checkpoint has no quantized layer; give --dtype for a dense file")
    names = tensor_names(student.config, architecture)
    plan = []
    for source, tensor in sources(student).items():
        name = file_name(names, source, architecture)
        layer = layers.get(source.removesuffix(".weight"))
        if layer is None or dtype is not None:
            type_name = dense_type(source, tensor, dtype, head)
        else:
            type_name = packed_type(source, layer)
        plan.append(PlannedTensor(source, name, type_name))
    return plan


def tensor_names(config: PreTrainedConfig, architecture: str) -> Any:
    """Return the `gguf` package's map from a model's names to the file's."""
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], config.num_hidden_layers)


def file_name(names: Any, source: str, architecture: str) -> str:
    """Return a tensor's name in the file.

    Raises:
        ValueError: If it has none.
    """
    name = names.get_name(source, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise ValueError(f"{source} has no name in {architecture} files; export --to hf")
    return name


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
    """Return the type of a dense tensor: vectors in f32, as kernels add them; matrices as asked.

    Raises:
        ValueError: If a value is beyond the type, or a row is no whole number of blocks.
    """
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


def packed_type(source: str, layer: FakeQuantWeight) -> str:
    """Return the type whose blocks hold a layer as it was trained.

    Raises:
        ValueError: If none does; names the layer and the remedy.
    """
    type_name = require_type(source, layer.spec)
    require_codebook(source, layer)
    require_float16(source, layer)
    return type_name


def require_type(source: str, spec: TensorSpec) -> str:
    """Return the type that holds a format exactly.

    Raises:
        ValueError: If none does; names the tensor and the remedy.
    """
    type_name = gguf_type_of(spec)
    if type_name is None:
        raise ValueError(
            f"{source} is on no grid of GGUF ({spec.name}); convert it first "
            "(`qat convert --plan gguf:q4_0`), or write it dense with --dtype fp16"
        )
    return type_name


def start_file(
    path: Path, config: PreTrainedConfig, vocabulary: Vocabulary, plan: list[PlannedTensor]
) -> Any:
    """Return a writer that has the model's and the tokenizer's keys."""
    import gguf

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture_of(config)]])
    # gguf 0.19.0 lacks Q2_0; with its sizes known it writes the type by its number.
    gguf.constants.GGML_QUANT_SIZES.setdefault(
        BLOCK_TYPES["q2_0"].number,
        (BLOCK_TYPES["q2_0"].num_weights, BLOCK_TYPES["q2_0"].num_bytes),
    )
    writer.add_name(getattr(config, "name_or_path", "") or config.model_type)
    add_sizes(writer, config)
    add_rope(writer, config)
    add_tokenizer(writer, vocabulary)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_file_type(main_file_type(plan))
    return writer


def head_dim_of(config: PreTrainedConfig) -> int:
    """Return the width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_sizes(writer: Any, config: PreTrainedConfig) -> None:
    """Write the model's sizes."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim_of(config))
    writer.add_value_length(head_dim_of(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def add_rope(writer: Any, config: PreTrainedConfig) -> None:
    """Write how positions turn heads."""
    import gguf

    rope = config.rope_parameters
    writer.add_rope_dimension_count(head_dim_of(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def rope_factors(config: PreTrainedConfig) -> Tensor | None:
    """Return what Llama 3 divides each frequency by, (half a head,); None for other kinds.

    Source: transformers 5.23, modeling_rope_utils.py, the llama3 parameters.
    """
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    width = head_dim_of(config)
    wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, width, 2).double() / width)
    turns = rope["original_max_position_embeddings"] / wavelength
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 1 for quick frequencies: kept
    return (1 / ((1 - smooth) / factor + smooth)).float()


def add_tokenizer(writer: Any, vocabulary: Vocabulary) -> None:
    """Write the tokenizer."""
    writer.add_tokenizer_model("gpt2")  # the format's word for byte-level BPE
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges or NO_MERGES)
    for word, index in vocabulary.special_ids.items():
        getattr(writer, f"add_{word}_token_id")(index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_space_prefix(False)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def main_file_type(plan: list[PlannedTensor]) -> int:
    """Return the file type of what most matrices of the blocks are."""
    types = [t.type_name for t in plan if t.source not in HEADS and t.type_name != "f32"]
    types = types or [t.type_name for t in plan]
    return BLOCK_TYPES[max(sorted(set(types)), key=types.count)].file_type


@torch.no_grad()
def write_tensors(writer: Any, student: nn.Module, plan: list[PlannedTensor]) -> dict[str, Any]:
    """Add every tensor and close the file; return what its types round."""
    sums: dict[str, Any] = {"rounded": 0, "head_sqnr_db": None}
    factors = rope_factors(student.config)
    if factors is not None:
        writer.add_tensor(ROPE_FACTORS, factors.numpy())
    for tensor in tqdm(plan, desc="gguf", unit="tensor"):
        packed = packed_bytes(student, tensor)
        noise = noise_ratio(student, tensor, packed)
        sums["rounded"] += noise > 0
        if tensor.source in HEADS and noise > 0:
            sums["head_sqnr_db"] = round(-10 * math.log10(noise), 2)
        ordered = in_file_order(packed, row_order(student.config, tensor.source))
        number = BLOCK_TYPES[tensor.type_name].number
        writer.add_tensor(tensor.name, ordered.numpy(), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sums


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
    wanted = float_tensor(student, tensor).double()
    kept = unpack_blocks(packed.view(-1, packed.shape[-1]), tensor.type_name).view_as(wanted)
    return float((kept - wanted).square().sum() / wanted.square().sum().clamp_min(1e-300))


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
    """Read a written file and compare each tensor with the student's.

    Returns:
        Number of tensors compared.

    Raises:
        ValueError: If one is missing, left over or differs; names it.
    """
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
        wanted = in_file_order(packed_bytes(student, tensor), order)
        if not equal_bits(read_bytes(path, record).view(-1), wanted.view(-1)):
            raise ValueError(f"{tensor.source} reads back otherwise than it was written")
    return len(plan)


def layer_name(tensor: PlannedTensor) -> str:
    """Return the name of the module that a tensor belongs to."""
    return tensor.source.rpartition(".")[0]
