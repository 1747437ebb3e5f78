"""The transformers plugin that loads `hf-quantized` folders.

    import qat.export.plugin
    AutoModelForCausalLM.from_pretrained(folder)

Such folders have a model type of their own, which only this module makes known. So a process that
lacks it stops with an error that names the import; were the type the base model's, transformers
would skip a quantization that it does not know and fill the weights with random numbers.

Loaders and users cast float tensors (`dtype=`, `.half()`), which would round scales. They are held
as the bits of their numbers in integers, which nothing casts.
"""

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from qat.grids.packing import unpack
from qat.grids.scalar import dequantize, low_rank_scale
from qat.model.surgery import quantizable_linears, swap
from qat.quant.scheme import LayerScheme, Scheme

METHOD = "qat"
MODEL_TYPE = "qat-student (import qat.export.plugin first)"  # transformers' error quotes it
BASE_TYPE_KEY = "qat_base_model_type"
BITS_DTYPES = {"float16": torch.int16, "bfloat16": torch.int16, "float32": torch.int32}


class PackedLinear(nn.Module):
    """A linear that holds packed indices and forms its weight at each forward."""

    def __init__(self, in_features: int, out_features: int, scheme: LayerScheme, *, has_bias: bool):
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        num_bytes = -(-in_features * out_features * scheme.bits // 8)
        self.register_buffer("indices", torch.empty(num_bytes, dtype=torch.uint8))
        for name, shape in self.part_shapes().items():
            dtype = BITS_DTYPES[scheme.stored_dtype]
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features)) if has_bias else None

    def part_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of scales and codebook by name."""
        shapes: dict[str, tuple[int, ...]] = {"codebook": (2**self.scheme.bits,)}
        rank = self.scheme.rank
        if not rank:
            groups = self.scheme.groups_of(self.in_features)
            return shapes | {"scale": (self.out_features, groups)}
        return shapes | {
            "scale_a": (self.out_features, rank),
            "magnitude": (rank,),
            "scale_b": (rank, self.in_features),
        }

    def part(self, name: str) -> Tensor:
        """Return scales or the codebook as float32 numbers."""
        return getattr(self, name).view(getattr(torch, self.scheme.stored_dtype)).float()

    def weight_on_grid(self) -> Tensor:
        """Return the weight that was trained, (O, I), float32."""
        indices = unpack(self.indices, self.scheme.bits, (self.out_features, self.in_features))
        if self.scheme.rank:
            scale = low_rank_scale(*(self.part(n) for n in ("scale_a", "magnitude", "scale_b")))
        else:
            scale = self.part("scale")
        if self.scheme.scale_floor is not None:
            scale = scale.clamp_min(self.scheme.scale_floor)
        return dequantize(indices, scale, self.part("codebook"))

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W_hat.T + bias for x of shape (..., I)."""
        return nn.functional.linear(x, self.weight_on_grid().to(x.dtype), self.bias)


def float_bits(values: Tensor, stored_dtype: str) -> Tensor:
    """Return stored numbers as the integers of their bits."""
    stored = values.detach().to(getattr(torch, stored_dtype)).contiguous()
    return stored.view(BITS_DTYPES[stored_dtype])


class StudentConfig(PreTrainedConfig):
    """Reads the config of an `hf-quantized` folder as that of its base model."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Return the base model's config, which keeps the quantization's."""
        values = dict(config_dict)
        values["model_type"] = values.pop(BASE_TYPE_KEY)
        known = AutoConfig.for_model(values["model_type"])
        return type(known).from_dict(values, **options)


@register_quantization_config(METHOD)
class StudentQuantizationConfig(QuantizationConfigMixin):
    """How each kind of layer is packed."""

    def __init__(self, scheme: dict[str, Any], **_ignored: Any):
        self.quant_method = METHOD
        self.scheme = scheme


@register_quantizer(METHOD)
class StudentQuantizer(HfQuantizer):
    """Puts packed layers where the folder has them, before its tensors are read."""

    requires_calibration = False

    @property
    def is_trainable(self) -> bool:
        """Return False: students train from their checkpoint."""
        return False

    def is_serializable(self) -> bool:
        """Return False: the folder that this was loaded from is the thing to copy."""
        return False

    def _process_model_before_weight_loading(self, model: nn.Module, **options: Any) -> None:
        scheme = Scheme.from_dict(self.quantization_config.scheme)
        for name, linear in quantizable_linears(model, scheme).items():
            swap(model, name, packed_linear(linear, scheme.layer(name)))
        refuse_missing(model, options.get("checkpoint_files") or ())


def packed_linear(linear: nn.Linear, scheme: LayerScheme) -> PackedLinear:
    """Return an empty packed layer of a linear's sizes, on its device."""
    with torch.device(linear.weight.device):
        return PackedLinear(
            linear.in_features, linear.out_features, scheme, has_bias=linear.bias is not None
        )


def refuse_missing(model: nn.Module, files: tuple[str, ...]) -> None:
    """Refuse files that lack a tensor of a packed layer; transformers would only warn.

    Raises:
        ValueError: If one is missing; names it.
    """
    found: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as handle:
            found |= set(handle.keys())
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            for part in module.state_dict():
                if found and f"{name}.{part}" not in found:
                    raise ValueError(f"{name}.{part} is missing from the folder; export it again")


AutoConfig.register(MODEL_TYPE, StudentConfig, exist_ok=True)
