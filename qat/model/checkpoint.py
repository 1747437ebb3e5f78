"""The native checkpoint folder: packed indices, float16 scales, dense parts, a header written last.

checkpoint.json       header: plan, base model, cache fingerprint, versions, sha256
student.safetensors   NAME.indices (bytes), NAME.scale or its factors, NAME.codebook; dense parts
config.json, tokenizer files: the folder needs nothing else to load
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
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
from qat.model.sharding import all_rows
from qat.quant.plan import QuantPlan, TensorInfo, check_plan_values, plan_from_dict, tensor_kind
from qat.quant.spec import TensorSpec
from qat.storage.decode import as_type, naming, reading
from qat.storage.files import atomic_folder, read_json, sha256_of_file, write_json

HEADER_NAME = "checkpoint.json"
TENSORS_NAME = "student.safetensors"
FORMAT = "qat-student-2"
OLD_FORMAT = "qat-student-1"  # of version 0.1.0: a scheme in the place of a plan
# Above what any model has; one that is said to be larger would take hours to be made and refused.
LARGEST_SIZES = {"vocab_size": 2**24, "hidden_size": 2**20, "num_hidden_layers": 2**12}
UNKNOWN_MODEL: dict[str, str | None] = {"path": None, "name": None, "weights": None}
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
    model: nn.Module,
    header: CheckpointHeader,
    folder: Path,
    *,
    text_source: Path,
    tensors: dict[str, Tensor] | None = None,
    notes: Mapping[str, object] | None = None,
) -> CheckpointHeader:
    """Write a student as a native folder, which appears only when whole; return its header.

    Versions and sha256 are filled in here; the tokenizer files come from `text_source`. `tensors`
    are what `student_tensors` gives, where it is at hand; `notes` are further JSON files by name.
    """
    with atomic_folder(folder) as temporary:
        save_file(student_tensors(model) if tensors is None else tensors, temporary / TENSORS_NAME)
        (temporary / TENSORS_NAME).chmod(0o644)  # safetensors makes its files private
        model.config.save_pretrained(temporary)
        copy_text_files(text_source, temporary)
        written = {
            **asdict(header),
            "versions": {name: version(name) for name in ("qat", "torch", "transformers")},
            "sha256": sha256_of_file(temporary / TENSORS_NAME),
        }
        for name, value in (notes or {}).items():
            write_json(temporary / name, value)
        write_json(temporary / HEADER_NAME, written)
    return CheckpointHeader(**written)


def student_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint file holds, by name.

    Rows that other processes have are gathered: all of them call this.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in surgery.quantized_layers(model).items():
        tensors |= layer_tensors(name, layer)
    return tensors | dense_tensors(model)


def layer_tensors(name: str, layer: FakeQuantWeight) -> dict[str, Tensor]:
    """Return what a checkpoint file holds of a quantized weight, by name."""
    indices = all_rows(layer, "indices", surgery.current_indices(layer))
    tensors = {f"{name}.indices": layer.spec.grid.pack(indices.cpu())}
    for part, values in surgery.stored_parts(layer).items():
        values = all_rows(layer, part, values)
        tensors[f"{name}.{part}"] = as_stored(values, layer.spec, name, part)
    return tensors


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

    Tied heads are the embedding itself and are left out. A number that is not finite is refused.
    """
    tensors: dict[str, Tensor] = {}
    for key, target in dense_targets(model).items():
        tensor = target.detach().cpu()
        if tensor.is_floating_point():
            require_finite(tensor, key)
        tensors[key] = smallest_lossless(tensor).contiguous()
    return tensors


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
    remedy = "make the checkpoint again or install the version that wrote it"
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}, this version reads {FORMAT!r}; {remedy}")
    header = as_type(values, CheckpointHeader, path, remedy=remedy)
    with naming(path):
        check_plan_values(header.plan)
    return replace(header, base_model={**UNKNOWN_MODEL, **header.base_model})


def read_checkpoint(
    folder: Path, *, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, CheckpointHeader]:
    """Return the student in a native folder, on the CPU, in eval mode, frozen.

    Dense parts are in `dtype`, scales and codebooks in float32. The dense weights of quantized
    layers are never formed.
    """
    folder = Path(folder)
    header = read_header(folder)
    if not (folder / TENSORS_NAME).is_file():
        raise FileNotFoundError(f"{folder / TENSORS_NAME} is missing; make the checkpoint again")
    if sha256_of_file(folder / TENSORS_NAME) != header.sha256:
        raise ValueError(
            f"{folder / TENSORS_NAME} does not match its sha256; fetch or make it again"
        )
    with naming(folder / HEADER_NAME):
        model = empty_student(folder, partial(plan_from_dict, header.plan), dtype)
    with reading(folder / TENSORS_NAME):
        file = safe_open(folder / TENSORS_NAME, framework="pt")
    with file, naming(folder / TENSORS_NAME):
        fill(model, file, dtype)
    return model.eval().requires_grad_(False), header


def empty_student(
    folder: Path, plan_of: Callable[[dict[str, TensorInfo]], QuantPlan], dtype: torch.dtype
) -> nn.Module:
    """Return a student whose tensors have sizes but no values; `plan_of` its parameters.

    The dense weights that quantized layers replace are on the meta device: on the CPU, freed, they
    would leave holes in the heap, and later tensors would be scattered over those.
    """
    model = model_without_values(read_model_config(folder), dtype)
    widen_attention(model)
    surgery.replace_weights(model, plan_of(surgery.model_tensors(model)), surgery.empty_layer)
    for key, tensor in model.named_parameters():
        if tensor.is_meta:
            surgery.put_value(model, key, torch.empty_like(tensor, device="cpu"))
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
    return build_model(config, dtype, torch.device(device))


def model_without_values(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """Return a frozen model with parameters on the meta device; buffers have their values.

    Those of rotary embeddings are in no file.
    """
    from accelerate import init_empty_weights

    model = build_model(config, dtype, init_empty_weights(include_buffers=False))
    return model.eval().requires_grad_(False)


def build_model(
    config: PreTrainedConfig, dtype: torch.dtype, where: AbstractContextManager[object]
) -> nn.Module:
    """Return a model of a config, not initialized; `where` decides where its tensors are."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with reading(f"{config.name_or_path}/config.json"):
        with no_init_weights(), where:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        model.tie_weights()  # not within: what moves parameters to meta parts tied ones
    return model


def read_model_config(folder: Path) -> PreTrainedConfig:
    """Return the model config in a folder; code that it names is never run.

    Raises:
        ValueError: If it cannot be read, or is of no language model, or of none that is that large.
    """
    from transformers import AutoConfig

    path, remedy = f"{folder}/config.json", "fetch or make that folder again"
    with reading(path, remedy):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        text = config.get_text_config()
        sizes = {name: getattr(text, name, None) for name in LARGEST_SIZES}
    for name, size in sizes.items():
        if not isinstance(size, int) or not 0 < size <= LARGEST_SIZES[name]:
            raise ValueError(
                f"{path}: {name} is {size!r}, not 1 .. {LARGEST_SIZES[name]} as a language model "
                f"has; {remedy}"
            )
    return config


class HeldTensors(dict[str, Tensor]):
    """Tensors in memory, asked for as those of an open safetensors file are."""

    def get_tensor(self, name: str) -> Tensor:
        """Return a tensor, which stays the holder's own."""
        return self[name].clone()


@torch.no_grad()
def fill(model: nn.Module, file: safe_open | HeldTensors, dtype: torch.dtype) -> None:
    """Put the tensors of an open safetensors file, or held ones, into an empty student.

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
        packed = take(f"{name}.indices")
        if packed.dtype != torch.uint8 or packed.dim() != 1:
            raise ValueError(f"tensor {name}.indices is no row of bytes; fetch or make it again")
        layer.indices = layer.spec.grid.unpack(packed, shape)
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
    if target.is_floating_point():
        require_finite(values, name)
    target.data = values.contiguous()


def require_finite(values: Tensor, name: str) -> None:
    """Refuse a tensor with NaN, infinity, or no numbers of the kind that weights are."""
    if not values.is_floating_point():
        raise ValueError(f"tensor {name} is of {values.dtype}, not of floats; make it again")
    if not torch.isfinite(values).all():
        raise ValueError(f"tensor {name} holds NaN or infinity; fetch or make it again")


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
    for file in text_files(source):
        (target / file.name).write_bytes(file.read_bytes())


def text_files(folder: Path) -> list[Path]:
    """Return a model folder's tokenizer, template and generation files."""
    found = (file for pattern in TEXT_FILES for file in Path(folder).glob(pattern))
    return [file for file in found if file.is_file()]
