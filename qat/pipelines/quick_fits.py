"""Students of many plans in memory, for a look: each weight is fitted once to each format."""

import torch
from torch import nn

from qat.cache.read import TeacherCache
from qat.model.load import load_dense
from qat.model.surgery import put_layer, quantized_layer
from qat.pipelines.compress_stages import Source
from qat.pipelines.fit_layers import FitTask
from qat.pipelines.quantize import row_weights, second_moments, spread_batches
from qat.pipelines.quantize_config import CALIBRATION_TOKENS
from qat.quant.plan import QuantPlan
from qat.quant.quantized_tensor import QuantizedTensor
from qat.quant.spec import TensorSpec


class QuickFits:
    """Fits by second moments of inputs, which do not depend on each other."""

    def __init__(self, source: Source, cache: TeacherCache) -> None:
        """Measure what weights are multiplied by, on a little text."""
        self.source = source
        count = max(1, CALIBRATION_TOKENS["moments"] // cache.seq_len)
        self.batches = spread_batches(cache, count)
        self.fitted: dict[tuple[str, TensorSpec], QuantizedTensor] = {}
        any_of = {name.removesuffix(".weight"): some[0] for name, some in source.specs.items()}
        model = self.dense_model()
        task = FitTask(specs=any_of, weight_of=lambda name: model.get_submodule(name).weight)
        self.moments = second_moments(model, task, self.batches, source.place.device) or {}

    def dense_model(self) -> nn.Module:
        """Return the full-precision model."""
        return load_dense(self.source.config.model, dtype=self.source.place.dtype)

    @torch.no_grad()
    def student(self, plan: QuantPlan) -> nn.Module:
        """Return the model with its weights in a plan's formats."""
        model = self.dense_model()
        task = FitTask(
            specs=plan.quantized,
            weight_of=lambda name: model.get_submodule(name).weight,
            row_weights=row_weights(model, plan, self.batches),
        )
        for name, spec in plan.quantized.items():
            if (name, spec) not in self.fitted:
                self.fitted[name, spec] = task.fit(name, self.moments.get(name))
            layer = quantized_layer(model.get_submodule(name), self.fitted[name, spec])
            put_layer(model, name, layer)
        return model.requires_grad_(False)
