"""A student as a plain Hugging Face folder: dense weights, read back and compared to the bit."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qat.export.checks import equal_bits, write_report
from qat.export.model_folder import SHARD_SIZE, add_text_files, cast, require_students
from qat.model.layers import FakeQuantLinear, FakeQuantWeight
from qat.model.surgery import is_tied_to, swap
from qat.storage.files import atomic_folder


def export_to_hf(
    student: nn.Module, output: Path, *, text_source: Path, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Write a student as a folder that `AutoModelForCausalLM` loads without this package.

    Its quantized layers become plain linears in place, in float32 when no dtype is given.
    """
    layers = require_students(student)
    num_rounded = make_dense(student, layers, dtype or torch.float32)
    with atomic_folder(output) as temporary:
        student.save_pretrained(temporary, max_shard_size=SHARD_SIZE)
        add_text_files(text_source, temporary)
        compared = compare_with_file(student, layers, temporary)
        return write_report(temporary, output, compared=compared, rounded=num_rounded)


@torch.no_grad()
def make_dense(student: nn.Module, layers: dict[str, FakeQuantWeight], dtype: torch.dtype) -> int:
    """Put plain linears in the quantized layers' places; return how many tensors dtype rounds.

    Tied heads stay tied, as parameters change their dtype in place.
    """
    for name, layer in tqdm(layers.items(), desc="dense weights", unit="layer"):
        dense = dense_layer(layer)
        if is_tied_to(student.get_output_embeddings(), layer):
            student.set_output_embeddings(linear_of(dense.weight))
        swap(student, name, dense)
    num_rounded = sum(cast({n: t}, dtype)[1] for n, t in student.named_parameters())
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
    """Return the number of tensors in a folder, loaded as anybody would, that equal the student's.

    Quantized weights are formed anew, so that the dense model is checked along with the file.
    """
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).state_dict()
    expected = student.state_dict()
    if odd := found.keys() ^ expected.keys():
        raise ValueError(f"{min(odd)} is in the student or in the file only; nothing was written")
    for key, tensor in tqdm(found.items(), desc="compared", unit="tensor"):
        owner, _, part = key.rpartition(".")
        trained = expected[key]
        if owner in layers and part == "weight":
            trained = layers[owner].fake_quantized_weight().to(trained.dtype)
        if not equal_bits(tensor, trained):
            raise ValueError(f"{key} reads back otherwise than it was written; export again")
    return len(found)
