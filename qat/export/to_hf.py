"""A student as a plain Hugging Face folder: dense weights, read back and compared to the bit."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qat.export.checks import equal_bits, write_report
from qat.export.model_folder import SHARD_SIZE
from qat.model.checkpoint import copy_text_files
from qat.model.layers import FakeQuantLinear, FakeQuantWeight
from qat.model.surgery import is_tied_to, quantized_layers, swap
from qat.storage.files import atomic_folder


def export_to_hf(
    student: nn.Module, output: Path, *, text_source: Path, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Write a student as a folder that `AutoModelForCausalLM` loads without this package.

    Args:
        student: On the CPU, in float32; its quantized layers become plain linears in place.
        output: A folder that does not exist; it appears only when written and compared.
        text_source: Folder of the tokenizer, template and generation files.
        dtype: Of the tensors written; float32, which holds every weight, when not given.

    Returns:
        path, exact (what the folder holds is the student in `dtype`, bit for bit),
        tensors_compared, tensors_rounded (those that `dtype` does not hold as trained).

    Raises:
        ValueError: If nothing is quantized, a value does not fit `dtype`, or a tensor
            reads back otherwise.
    """
    layers = quantized_layers(student)
    if not layers:
        raise ValueError("the checkpoint has no quantized layer; export takes a student")
    num_rounded = make_dense(student, layers, dtype or torch.float32)
    with atomic_folder(output) as temporary:
        student.save_pretrained(temporary, max_shard_size=SHARD_SIZE)
        copy_text_files(text_source, temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors makes its files private
        report = {
            "path": str(output),
            "exact": True,
            "tensors_compared": compare_with_file(student, layers, temporary),
            "tensors_rounded": num_rounded,
        }
        write_report(temporary, report)
    return report


@torch.no_grad()
def make_dense(student: nn.Module, layers: dict[str, FakeQuantWeight], dtype: torch.dtype) -> int:
    """Put plain linears in the quantized layers' places, everything in one dtype.

    Tied heads stay tied, as parameters change their dtype in place.

    Returns:
        Number of tensors that the dtype rounds.

    Raises:
        ValueError: If a value does not fit the dtype; names the tensor.
    """
    for name, layer in tqdm(layers.items(), desc="dense weights", unit="layer"):
        dense = dense_layer(layer)
        if is_tied_to(student.get_output_embeddings(), layer):
            student.set_output_embeddings(linear_of(dense.weight))
        swap(student, name, dense)
    num_rounded = 0
    for name, tensor in student.named_parameters():
        cast = tensor.to(dtype)
        if not torch.isfinite(cast).all():
            raise ValueError(f"{name} holds NaN or values beyond {dtype}; use --dtype fp32")
        num_rounded += not torch.equal(cast.to(tensor.dtype), tensor)
    student.to(dtype)
    return num_rounded


def dense_layer(layer: FakeQuantWeight) -> nn.Linear | nn.Embedding:
    """Return the plain linear or embedding that holds what a quantized layer computes with."""
    weight = nn.Parameter(layer.fake_quantized_weight(), requires_grad=False)
    if isinstance(layer, FakeQuantLinear):
        return linear_of(weight, layer.bias)
    embedding = nn.Embedding(*weight.shape, device="meta")
    embedding.weight = weight
    return embedding


def linear_of(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Linear:
    """Return a linear around parameters, none of which is copied."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = weight, bias
    return linear


@torch.no_grad()
def compare_with_file(student: nn.Module, layers: dict[str, FakeQuantWeight], folder: Path) -> int:
    """Load a written folder as anybody would and compare it with the student.

    Quantized weights are formed anew, so that the dense model is checked along with the file.

    Returns:
        Number of tensors compared.

    Raises:
        ValueError: If one differs, is missing or is left over; names it.
    """
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected = student.state_dict()
    if odd := found.keys() ^ expected.keys():
        raise ValueError(f"{min(odd)} is in the student or in the file only; nothing was written")
    for key, tensor in tqdm(found.items(), desc="compared", unit="tensor"):
        owner, _, part = key.rpartition(".")
        wanted = expected[key]
        if owner in layers and part == "weight":
            wanted = layers[owner].fake_quantized_weight().to(wanted.dtype)
        if not equal_bits(tensor, wanted):
            raise ValueError(f"{key} reads back otherwise than it was written; export again")
    return len(found)
