"""A full-precision model whose weights are read from its files while they are needed.

Its parameters have sizes but no values (torch's meta device), but for those of the part that is
loaded: memory holds one decoder layer where `load_dense` holds the model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qat.model.attention import widen_attention
from qat.model.checkpoint import model_without_values, read_model_config, require_finite
from qat.model.load import ShardIndex, dense_folder, require_own_files, tensors_in
from qat.model.surgery import put_value
from qat.storage.decode import naming, read_as

WHOLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


class NeedsWhole(Exception):  # noqa: N818 no error where `load_dense` takes such a model
    """Says why a model cannot be taken part by part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayeredModel:
    """A model without values, and where they are."""

    folder: Path
    model: nn.Module
    """In eval mode, frozen; parameters on the meta device, other buffers as they are computed."""
    dtype: torch.dtype
    """What weights are read in."""
    readers: Mapping[str, Callable[[], Tensor]]
    """A function for each tensor of the files."""

    @property
    def layers(self) -> list[str]:
        """Names of the decoder layers, in the order of the forward pass."""
        names = {id(module): name for name, module in self.model.named_modules()}
        return [names[id(layer)] for layer in self.model.get_decoder().layers]

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and stored buffers by name, tied ones once."""
        found: dict[int, tuple[str, Tensor]] = {}
        for key, tensor in self.model.state_dict(keep_vars=True).items():
            found.setdefault(id(tensor), (key, tensor))
        return dict(found.values())

    def read(self, key: str) -> Tensor:
        """Return a parameter's or buffer's value, finite, as `load_dense` would have it.

        Raises:
            NeedsWhole: If it has another shape than the model's.
            ValueError: If it is not finite.
        """
        tensor, target = self.readers[key](), self.model.state_dict(keep_vars=True)[key]
        if tensor.shape != target.shape or not tensor.is_floating_point():
            raise NeedsWhole(f"{key} is not as config.json has it")
        value = tensor.to(self.dtype)  # which may not hold what the file does
        with naming(self.folder):
            require_finite(value, key)
        return value

    def weight(self, name: str) -> Tensor:
        """Return the weight of a module, (O, I)."""
        return self.read(f"{name}.weight")

    @contextmanager
    def loaded(self, keys: list[str]) -> Iterator[None]:
        """Have values of some tensors inside the block, and none afterwards."""
        for key in keys:
            put_value(self.model, key, self.read(key))
        try:
            yield
        finally:
            there = self.model.state_dict(keep_vars=True)
            for key in there.keys() & set(keys):  # others have been taken out
                put_value(self.model, key, torch.empty_like(there[key], device="meta"))


def open_layered(name: str | Path, dtype: torch.dtype) -> LayeredModel:
    """Open a Hugging Face causal LM whose weights are read later.

    Raises:
        NeedsWhole: If they cannot be read part by part as `load_dense` reads them: they are in
            files other than safetensors, under other names than the model's, or quantized.
        FileNotFoundError: If there is no such model.
        ValueError: If a file is damaged.
    """
    folder = dense_folder(name)
    config = read_model_config(folder)
    require_own_files(folder)
    if getattr(config, "quantization_config", None):
        raise NeedsWhole("its weights are quantized")
    model = model_without_values(config, dtype)
    widens = model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict
    if widens and dtype != torch.float32:
        raise NeedsWhole("some of its weights stay in float32")
    readers: dict[str, Callable[[], Tensor]] = {}
    for file in safetensors_files(folder):
        readers |= tensors_in(file)
    require_same_names(model, readers)
    widen_attention(model)
    return LayeredModel(folder=folder, model=model, dtype=dtype, readers=readers)


def safetensors_files(folder: Path) -> list[Path]:
    """Return the files that transformers would read."""
    if (folder / WHOLE_FILE).is_file():
        return [folder / WHOLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise NeedsWhole(f"there is no {WHOLE_FILE}")
    index = read_as(folder / INDEX_FILE, ShardIndex)
    files = {folder / file for file in index["weight_map"].values()}
    if missing := [file for file in files if not file.is_file()]:
        raise NeedsWhole(f"{missing[0].name} is missing")
    return sorted(files)


def require_same_names(model: nn.Module, readers: Mapping[str, object]) -> None:
    """Refuse files that lack a tensor of the model's, or that hold a tied one a second time."""
    seen: set[int] = set()
    for key, target in model.state_dict(keep_vars=True).items():
        is_tied = id(target) in seen
        seen.add(id(target))
        if is_tied == (key in readers):
            raise NeedsWhole(f"{key} is {'tied, and there' if is_tied else 'not there'}")
