"""The native checkpoint folder: packed indices, float16 scales, dense parts, a header written last.

checkpoint.json       header: plan, base model, cache fingerprint, versions, sha256
student.safetensors   NAME.indices (bytes), NAME.scale or its factors, NAME.codebook; dense parts
config.json, tokenizer files: the folder needs nothing else to load
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from qat.grids.scalar import fits_float16, snap_bfloat16
from qat.model import surgery
from qat.model.attention import widen_attention
from qat.model.layers import FakeQuantWeight
from qat.quant.plan import QuantPlan, TensorInfo, plan_from_dict, tensor_kind
from qat.quant.spec import TensorSpec
from qat.storage.files import atomic_folder, read_json, sha256_of_file, write_json

HEADER_NAME = "checkpoint.json"
TENSORS_NAME = "student.safetensors"
FORMAT = "qat-student-2"
OLD_FORMAT = "qat-student-1"  # of version 0.1.0: a scheme in the place of a plan
TEXT_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointHeader:
    """What a checkpoint says of itself."""

    plan: dict[str, Any]
    """As `QuantPlan.to_dict` writes it."""
    base_model: dict[str, str | None]
    """Path as given, name and weights hash of the full-precision model; None where not known."""
    cache_fingerprint: str | None = None
    """Cache that calibrated or trained it."""
    made_by: dict[str, Any] = field(default_factory=dict)
    """Command and config."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Held-out numbers where they were measured."""
    versions: dict[str, str] = field(default_factory=dict)
    sha256: str = ""
    format: str = FORMAT


def write_checkpoint(
    model: nn.Module, header: CheckpointHeader, folder: Path, *, text_source: Path
) -> CheckpointHeader:
    """Write a student as a native folder, which appears only when whole; return its header.

    Versions and sha256 are filled in here; the tokenizer files come from `text_source`.
    """
    with atomic_folder(folder) as temporary:
        save_file(student_tensors(model), temporary / TENSORS_NAME)
        (temporary / TENSORS_NAME).chmod(0o644)  # safetensors makes its files private
        model.config.save_pretrained(temporary)
        copy_text_files(text_source, temporary)
        written = {
            **asdict(header),
            "versions": {name: version(name) for name in ("qat", "torch", "transformers")},
            "sha256": sha256_of_file(temporary / TENSORS_NAME),
        }
        write_json(temporary / HEADER_NAME, written)
    return CheckpointHeader(**written)


def student_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint file holds, by name."""
    tensors: dict[str, Tensor] = {}
    for name, layer in surgery.quantized_layers(model).items():
        tensors[f"{name}.indices"] = layer.spec.grid.pack(surgery.current_indices(layer).cpu())
        for part, values in surgery.stored_parts(layer).items():
            tensors[f"{name}.{part}"] = as_stored(values, layer.spec, name, part)
    return tensors | dense_tensors(model)


def as_stored(values: Tensor, spec: TensorSpec, name: str, part: str) -> Tensor:
    """Return scales or a codebook as a file holds them; refused if that loses them."""
    dtype = spec.stored_dtype
    values = values.detach().cpu()
    if dtype == "bfloat16":
        values = snap_bfloat16(values)
    fits = bool(torch.isfinite(values).all()) if dtype == "float32" else fits_float16(values)
    if not fits:
        raise ValueError(
            f"{name}.{part} holds NaN or values beyond {dtype}; train with a lower rate"
        )
    return spec.store_part(part, values).contiguous()


def dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parts that are not quantized, each once, in the smallest lossless dtype.

    Tied heads are the embedding itself and are left out.
    """
    return {
        key: smallest_lossless(tensor.detach().cpu()).contiguous()
        for key, tensor in dense_targets(model).items()
    }


def smallest_lossless(tensor: Tensor) -> Tensor:
    """Return a float tensor in bfloat16 or float16 if that loses nothing, else as it is."""
    if tensor.dtype != torch.float32:
        return tensor
    for dtype in (torch.bfloat16, torch.float16):
        smaller = tensor.to(dtype)
        if torch.equal(smaller.float(), tensor):
            return smaller
    return tensor


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a native checkpoint."""
    return (Path(folder) / HEADER_NAME).is_file()


def read_header(folder: Path) -> CheckpointHeader:
    """Return the header of a native folder.

    Raises:
        FileNotFoundError: If the folder is no student.
        ValueError: If it was written by another version of the format.
    """
    path = Path(folder) / HEADER_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no student, it holds no {HEADER_NAME}; `qat init-student` makes one"
        )
    values = read_json(path)
    found = values.get("format") if isinstance(values, dict) else None
    if found == OLD_FORMAT and "scheme" in values:
        values = {**values, "plan": values["scheme"], "format": FORMAT}
        del values["scheme"]
        found = FORMAT
    known = {f.name for f in fields(CheckpointHeader)}
    if found != FORMAT or not {"plan", "base_model"} <= set(values) <= known:
        raise ValueError(
            f"{path} has format {found!r} or other fields than this version reads ({FORMAT!r}); "
            "make the checkpoint again or install the version that wrote it"
        )
    return CheckpointHeader(**values)


def read_checkpoint(
    folder: Path, *, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, CheckpointHeader]:
    """Return the student in a native folder, on the CPU, in eval mode, frozen.

    Dense parts are in `dtype`, scales and codebooks in float32. The dense weights of quantized
    layers are never formed: their memory is not touched.
    """
    folder = Path(folder)
    header = read_header(folder)
    if not (folder / TENSORS_NAME).is_file():
        raise FileNotFoundError(f"{folder / TENSORS_NAME} is missing; make the checkpoint again")
    if sha256_of_file(folder / TENSORS_NAME) != header.sha256:
        raise ValueError(
            f"{folder / TENSORS_NAME} does not match its sha256; fetch or make it again"
        )
    model = empty_student(folder, partial(plan_from_dict, header.plan), dtype)
    with safe_open(folder / TENSORS_NAME, framework="pt") as file:
        fill(model, file, dtype)
    return model.eval().requires_grad_(False), header


def empty_student(
    folder: Path, plan_of: Callable[[dict[str, TensorInfo]], QuantPlan], dtype: torch.dtype
) -> nn.Module:
    """Return a student whose tensors have sizes but no values; `plan_of` its parameters."""
    model = empty_model(folder, dtype)
    widen_attention(model)
    surgery.replace_weights(model, plan_of(surgery.model_tensors(model)), surgery.empty_layer)
    return model


def empty_model(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """Return a full-precision model whose tensors have sizes but no values.

    Device "meta" takes no memory at all, for who reads sizes only.
    """
    return empty_model_of(read_model_config(folder), dtype, device)


def empty_model_of(
    config: PreTrainedConfig, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> nn.Module:
    """Return the same of a config."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def read_model_config(folder: Path) -> PreTrainedConfig:
    """Return the model config in a folder."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise ValueError(
            f"{folder}/config.json cannot be read ({why}); fetch or make that folder again"
        ) from error


@torch.no_grad()
def fill(model: nn.Module, file: safe_open, dtype: torch.dtype) -> None:
    """Put the tensors of an open safetensors file into an empty student.

    One tensor is read at a time, and takes the place of the empty one: no second copy is held.
    """
    layers = surgery.quantized_layers(model)
    left = set(file.keys())

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"tensor {name} is missing from {TENSORS_NAME}; make it again")
        left.remove(name)
        return file.get_tensor(name)

    for name, layer in layers.items():
        shape = (layer.out_features, layer.in_features)
        layer.indices = layer.spec.grid.unpack(take(f"{name}.indices"), shape)
        for part, empty in layer.parts.items():
            values = layer.spec.load_part(part, take(f"{name}.{part}"), tuple(empty.shape))
            put(empty, values, f"{name}.{part}")
        require_computed(name, layer)
    for key, target in dense_targets(model).items():
        put(target, take(key).to(dtype), key)
    if left:
        raise ValueError(f"unknown tensor {min(left)} in {TENSORS_NAME}; it fits another model")


def require_computed(name: str, layer: FakeQuantWeight) -> None:
    """Refuse scales that a runtime of exact ones would compute with otherwise."""
    if layer.spec.scale.exact_top:
        pair = layer.scale.detach(), layer.offset.detach()
        exact = layer.spec.scale.computed(*pair)
        if not all(torch.equal(a, b) for a, b in zip(exact, pair, strict=True)):
            raise ValueError(
                f"{name} has scales that float16 does not compute with exactly, as early students "
                f"of {layer.spec.name} had; make the student again"
            )


def dense_targets(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and stored buffers outside the quantized layers, tied ones once.

    Biases of quantized layers are among them.
    """
    layers = surgery.quantized_layers(model)
    stored = model.state_dict(keep_vars=True)  # the parameters themselves, not views of them
    targets: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in stored.items():
        owner, _, part = key.rpartition(".")
        if (owner in layers and part != "bias") or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        targets[key] = tensor
    return targets


@contextmanager
def dense_parts_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Compute in a dtype inside the block; afterwards dense parts are what they were, unrounded.

    Where they were is where they are afterwards, whatever the model is moved to inside.
    """
    previous = {target: target.data for target in dense_targets(model).values()}
    for target, values in previous.items():
        if values.is_floating_point():
            target.data = values.to(dtype)
    try:
        yield
    finally:
        for target, values in previous.items():
            target.data = values


def put(target: Tensor, values: Tensor, name: str) -> None:
    """Make a parameter or buffer hold values of the same shape."""
    if target.shape != values.shape:
        raise ValueError(
            f"tensor {name} has shape {tuple(values.shape)}, the model has "
            f"{tuple(target.shape)}; the checkpoint fits another model"
        )
    target.data = values.contiguous()


def bits_per_weight(model: nn.Module) -> dict[str, float | None]:
    """Return bits per weight of everything that ships: quantized layers, MLP layers, whole model.

    The whole model counts dense parts in the dtype that the checkpoint stores them in.
    """
    bits: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for name, layer in surgery.quantized_layers(model).items():
        kind, shape = tensor_kind(name), (layer.out_features, layer.in_features)
        bits[kind] += layer.spec.size_bits(shape)
        weights[kind] += shape[0] * shape[1]
    dense = dense_tensors(model).values()
    dense_bits = sum(tensor.numel() * tensor.element_size() * 8 for tensor in dense)
    dense_weights = sum(tensor.numel() for tensor in dense)
    return {
        "bits_per_weight": ratio(bits.total(), weights.total()),
        "bits_per_weight_mlp": ratio(bits["mlp"], weights["mlp"]),
        "bits_per_weight_model": ratio(bits.total() + dense_bits, weights.total() + dense_weights),
    }


def ratio(amount: float, count: int) -> float | None:
    """Return amount / count, None where there is nothing to count."""
    return round(amount / count, 4) if count else None


def copy_text_files(source: Path, target: Path) -> None:
    """Copy tokenizer, template and generation files, which ship with every model folder."""
    for pattern in TEXT_FILES:
        for file in Path(source).glob(pattern):
            if file.is_file():
                (target / file.name).write_bytes(file.read_bytes())
