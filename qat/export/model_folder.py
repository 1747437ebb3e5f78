"""A student as tensors and a config in a Hugging Face folder: what several formats share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.export.checks import (
    bytes_below,
    require_codebook,
    require_equal,
    require_float16,
    write_report,
)
from qat.grids.packing import pack, unpack
from qat.model.checkpoint import copy_text_files
from qat.model.layers import FakeQuantWeight
from qat.model.surgery import quantized_layers
from qat.storage.files import atomic_folder, read_json, write_json

SHARD_SIZE = "5GB"  # larger files are refused by some hosts and file systems
LOSSLESS_ORDER = (torch.bfloat16, torch.float16, torch.float32)

Writer = Callable[[FakeQuantWeight], dict[str, Tensor]]
Reader = Callable[[FakeQuantWeight, dict[str, Tensor]], Tensor]


def dense_parts(student: nn.Module) -> dict[str, Tensor]:
    """Return the parameters outside the quantized layers' weights by name, tied ones once."""
    layers = quantized_layers(student)
    return {
        key: tensor.detach()
        for key, tensor in student.named_parameters()
        if key.rpartition(".")[0] not in layers or key.endswith(".bias")
    }


def lossless_dtype(tensors: list[Tensor]) -> torch.dtype:
    """Return the smallest dtype that holds every tensor as it is: bf16, fp16 or fp32."""
    return next(dtype for dtype in LOSSLESS_ORDER if all(holds(dtype, t) for t in tensors))


def holds(dtype: torch.dtype, tensor: Tensor) -> bool:
    """Return whether a dtype has every number of a float32 tensor; float32 has."""
    return dtype == torch.float32 or torch.equal(tensor.to(dtype).float(), tensor.float())


def require_students(student: nn.Module) -> dict[str, FakeQuantWeight]:
    """Return the quantized layers; refuse a model that has none."""
    layers = quantized_layers(student)
    if not layers:
        raise ValueError("the checkpoint has no quantized layer; export takes a student")
    return layers


def require_integer_grid(
    name: str,
    layer: FakeQuantWeight,
    *,
    kinds: tuple[str, ...] = ("int",),
    bits: tuple[int, ...],
    group_sizes: tuple[int, ...],
) -> None:
    """Refuse a layer that is not on an integer grid with one scale a group.

    Args:
        name: Of the layer.
        layer: Its format and values.
        kinds: Of codebooks that the format has.
        bits: What the format has.
        group_sizes: What the format has; empty for any.
    """
    spec = layer.spec
    convert = "convert it first (`qat convert --plan deploy`) or export --to hf"
    if spec.grid.kind not in kinds or spec.rank or spec.floor is not None:
        raise ValueError(
            f"{name} is {spec.name}, the format holds integers times a scale; {convert}"
        )
    if spec.bits not in bits:
        raise ValueError(f"{name} has {spec.bits} bits, the format {bits}; {convert}")
    group_size = spec.group_size or layer.in_features
    if group_sizes and group_size not in group_sizes:
        raise ValueError(f"{name} has groups of {group_size}, the format {group_sizes}; {convert}")
    if group_size * spec.bits % 32:
        raise ValueError(f"{name}: groups of {group_size} fill no 32-bit words; {convert}")
    require_codebook(name, layer)
    require_float16(name, layer)


def write_folder(
    student: nn.Module,
    output: Path,
    *,
    text_source: Path,
    dtype: torch.dtype | None,
    config_changes: dict[str, Any],
    write: Writer,
    read: Reader,
    made_for: str = "pt",
) -> dict[str, Any]:
    """Write a folder of packed layers and dense parts, read it back, compare, report.

    Args:
        student: As in every export, like output and text_source.
        output: A folder.
        text_source: A folder.
        dtype: Of the dense parts.
        config_changes: Entries of config.json beyond the model's own.
        write: Returns what a layer's file entries are, by the last part of their names.
        read: Returns the weight, (O, I) float32, that such entries stand for.
        made_for: Library that the safetensors files name.
    """
    from huggingface_hub import save_torch_state_dict

    layers, dense = quantized_layers(student), dense_parts(student)
    dtype = dtype or lossless_dtype(list(dense.values()))
    dense, num_rounded = cast(dense, dtype)
    tensors = dict(dense)
    for name, layer in layers.items():
        tensors |= {f"{name}.{part}": t.contiguous() for part, t in write(layer).items()}
    with atomic_folder(output) as temporary:
        metadata = {"format": made_for}
        save_torch_state_dict(tensors, temporary, max_shard_size=SHARD_SIZE, metadata=metadata)
        student.config.save_pretrained(temporary)
        config = read_json(temporary / "config.json")
        config |= {"dtype": str(dtype).removeprefix("torch."), **config_changes}
        write_json(temporary / "config.json", config)
        add_text_files(text_source, temporary)
        return write_report(
            temporary,
            output,
            compared=compare_with_files(layers, dense, temporary, read),
            rounded=num_rounded,
            dtype=config["dtype"],
            file_bytes=bytes_below(temporary),
        )


def add_text_files(text_source: Path, folder: Path) -> None:
    """Complete a folder of weights; safetensors makes its files private."""
    copy_text_files(text_source, folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """Return dense tensors in a dtype that reaches all values, and how many of them it rounds."""
    made = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    for name, tensor in made.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or values beyond {dtype}; use --dtype fp32")
    return made, sum(not holds(dtype, tensor) for tensor in tensors.values())


def compare_with_files(
    layers: dict[str, FakeQuantWeight], dense: dict[str, Tensor], folder: Path, read: Reader
) -> int:
    """Return the number of tensors in a folder's files; refuse one that is not the student's."""
    found = read_tensors(folder)
    for name, layer in layers.items():
        prefix = f"{name}."
        parts = {k.removeprefix(prefix): t for k, t in found.items() if k.startswith(prefix)}
        with torch.no_grad():
            require_equal(name, read(layer, parts), layer)
    for name, tensor in dense.items():
        if name not in found or not torch.equal(found[name], tensor):
            raise ValueError(f"{name} reads back otherwise than it was written; export again")
    return len(layers) + len(dense)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder's safetensors files by name."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def layers_by_grid(layers: dict[str, FakeQuantWeight]) -> dict[tuple[int, int], list[str]]:
    """Return the names of layers by (bits, group size), the most frequent grid first."""
    grids: dict[tuple[int, int], list[str]] = {}
    for name, layer in layers.items():
        spec = layer.spec
        grids.setdefault((spec.bits, spec.group_size or layer.in_features), []).append(name)
    return dict(sorted(grids.items(), key=lambda item: -len(item[1])))


def pack_words(indices: Tensor, bits: int) -> Tensor:
    """Return indices as 32-bit words, (O, I * bits / 32) int32; whole words fill a row."""
    return pack(indices, bits).view(torch.int32).view(indices.shape[0], -1)


def unpack_words(words: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Return uint8 indices of the given shape from 32-bit words."""
    return unpack(words.contiguous().view(torch.uint8).flatten(), bits, shape)
