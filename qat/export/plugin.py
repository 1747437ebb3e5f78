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
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qat.model.surgery import dense_weights, is_tied_to, model_tensors, swap
from qat.quant.plan import plan_from_dict
from qat.quant.quantized_tensor import QuantizedTensor
from qat.quant.spec import TensorSpec
from qat.storage.decode import reading

METHOD = "qat"
MODEL_TYPE = "qat-student (import qat.export.plugin first)"  # transformers' error quotes it
BASE_TYPE_KEY = "qat_base_model_type"
BITS_DTYPES = {"float16": torch.int16, "bfloat16": torch.int16, "float32": torch.int32}
STORED_NAMES = {torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32"}  # of safetensors
REMEDY = "export it again"


class PackedWeight(nn.Module):
    """A weight that is held as packed indices and formed at each forward."""

    def __init__(self, out_features: int, in_features: int, spec: TensorSpec):
        super().__init__()
        self.shape, self.spec = (out_features, in_features), spec
        self.in_features, self.out_features = in_features, out_features
        indices = torch.zeros(spec.grid.index_shape(self.shape), dtype=spec.grid.index_dtype)
        self.register_buffer("indices", spec.grid.pack(indices))
        for name, shape in spec.part_shapes(self.shape).items():
            self.register_buffer(name, stored_bits(spec, name, torch.zeros(shape)))

    def part(self, name: str) -> Tensor:
        """Return scales or the codebook as float32 numbers."""
        bits, shape = getattr(self, name), self.spec.part_shapes(self.shape)[name]
        is_packed = bits.dtype == torch.uint8
        stored = bits if is_packed else bits.view(getattr(torch, self.spec.stored_dtype))
        return self.spec.load_part(name, stored, shape)

    def weight_on_grid(self) -> Tensor:
        """Return the weight that was trained, (O, I), float32."""
        indices = self.spec.grid.unpack(self.indices, self.shape)
        parts = {name: self.part(name) for name in self.spec.part_shapes(self.shape)}
        return QuantizedTensor(self.spec, indices, parts).dequantize()


class PackedLinear(PackedWeight):
    """A linear with a packed weight."""

    def __init__(self, in_features: int, out_features: int, spec: TensorSpec, *, has_bias: bool):
        super().__init__(out_features, in_features, spec)
        self.bias = nn.Parameter(torch.empty(out_features)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W_hat.T + bias for x of shape (..., I)."""
        return nn.functional.linear(x, self.weight_on_grid().to(x.dtype), self.bias)


class PackedEmbedding(PackedWeight):
    """An embedding with a packed table."""

    def __init__(self, embedding: nn.Embedding, spec: TensorSpec):
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, spec)
        self.dtype = embedding.weight.dtype
        # Gemma keeps the number next to the buffer, which has no value on the meta device.
        scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
        self.embed_scale = None if scale is None else float(scale)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the rows of token ids, (..., I)."""
        rows = nn.functional.embedding(token_ids, self.weight_on_grid()).to(self.dtype)
        if self.embed_scale is None:
            return rows
        return rows * torch.tensor(self.embed_scale, device=rows.device).to(rows.dtype)


class PackedHead(nn.Module):
    """A head that multiplies with a packed embedding."""

    def __init__(self, embedding: PackedEmbedding):
        super().__init__()
        self.tied = (embedding,)  # in a tuple, so that its buffers are not registered twice

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W_hat.T for hidden states x of shape (..., H)."""
        return nn.functional.linear(x, self.tied[0].weight_on_grid().to(x.dtype))


def stored_bits(spec: TensorSpec, name: str, values: Tensor) -> Tensor:
    """Return a part as integers: packed ones as they are, stored numbers as their bits."""
    stored = spec.store_part(name, values.detach()).contiguous()
    return stored if stored.dtype == torch.uint8 else stored.view(BITS_DTYPES[spec.stored_dtype])


class StudentConfig(PreTrainedConfig):
    """Reads the config of an `hf-quantized` folder as that of its base model."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: object) -> PreTrainedConfig:
        """Return the base model's config, which keeps the quantization's."""
        values = dict(config_dict)
        values["model_type"] = values.pop(BASE_TYPE_KEY)
        known = AutoConfig.for_model(values["model_type"])
        return type(known).from_dict(values, **options)


@register_quantization_config(METHOD)
class StudentQuantizationConfig(QuantizationConfigMixin):
    """The format of each packed tensor."""

    def __init__(self, plan: dict[str, Any], **_ignored: object):
        self.quant_method = METHOD
        self.plan = plan


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

    def _process_model_before_weight_loading(self, model: nn.Module, **options: object) -> None:
        if model.config.tie_word_embeddings:  # transformers ties after this; plans name it once
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        plan = plan_from_dict(self.quantization_config.plan, model_tensors(model))
        for name, module in dense_weights(model, plan).items():
            is_tied = is_tied_to(model.get_output_embeddings(), module)
            packed = packed_layer(module, plan.quantized[name])
            swap(model, name, packed)
            if is_tied and isinstance(packed, PackedEmbedding):
                model.set_output_embeddings(PackedHead(packed))
                model.config.tie_word_embeddings, model.all_tied_weights_keys = False, {}
        refuse_others(model, options.get("checkpoint_files") or ())


def packed_layer(module: nn.Module, spec: TensorSpec) -> PackedWeight:
    """Return an empty packed layer of a module's sizes, on its device."""
    with torch.device(module.weight.device):
        if isinstance(module, nn.Embedding):
            return PackedEmbedding(module, spec)
        return PackedLinear(
            module.in_features, module.out_features, spec, has_bias=module.bias is not None
        )


def refuse_others(model: nn.Module, files: tuple[str, ...]) -> None:
    """Refuse files whose tensors are not those of the model; transformers would take some as is."""
    found: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        with reading(file, REMEDY), safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 not a dict
                one = handle.get_slice(name)
                found[name] = (one.get_dtype(), one.get_shape())
    for name, _ in model.named_parameters():
        if name in found and "F" not in found[name][0]:
            raise ValueError(f"{name} is of {found[name][0]}, not of floats; {REMEDY}")
    modules = model.named_modules() if found else ()
    for name, module in modules:
        for part, values in module.state_dict().items() if isinstance(module, PackedWeight) else ():
            if (told := found.get(f"{name}.{part}")) is None:
                raise ValueError(f"{name}.{part} is missing from the folder; {REMEDY}")
            expected = (STORED_NAMES.get(values.dtype), list(values.shape))
            if not values.is_floating_point() and told != expected:
                raise ValueError(f"{name}.{part} is {told}, not {expected}; {REMEDY}")


AutoConfig.register(MODEL_TYPE, StudentConfig, exist_ok=True)
