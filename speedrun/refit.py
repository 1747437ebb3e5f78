"""Measure what a converter that fits scales anew makes of a trained student: a table in log.md.

Every weight goes through ggml's own quantizer to the block type that holds it exactly, as
`llama-quantize` would send it; the KL is that of the cache's held-out split.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.cli.command import run_command
from qat.tracking.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitConfig:
    """Send a student's weights through ggml's quantizer and measure before and after."""

    checkpoint: Path
    """A student or run on the grids of GGUF types, such as plan `deploy`."""
    cache_dir: Path
    """Teacher cache to measure on."""


def act(config: RefitConfig) -> dict[str, Any]:
    """Load, measure, fit anew, measure."""
    import torch
    from torch import nn

    from qat.evaluate.on_cache import evaluate_on_cache
    from qat.export.ggml import dequantize_blocks, open_ggml, quantize_anew
    from qat.model.surgery import quantized_layers, swap
    from qat.pipelines.open_cache import open_teacher_cache
    from qat.pipelines.open_checkpoint import load_model
    from qat.quant.spec import gguf_type_of
    from qat.tracking.record import kl_name

    ggml, cache = open_ggml(), open_teacher_cache(config.cache_dir)
    student, _header = load_model(config.checkpoint)
    place = {"device": torch.device("cpu"), "dtype": torch.float32}
    trained = evaluate_on_cache(student, cache, **place)
    changes = defaultdict(list)
    for name, layer in quantized_layers(student).items():
        type_name = gguf_type_of(layer.spec)
        if type_name is None:
            raise ValueError(f"--checkpoint {config.checkpoint}: no GGUF type holds {name} exactly")
        weight = layer.fake_quantized_weight().detach()
        packed = quantize_anew(ggml, weight, type_name)
        found = dequantize_blocks(ggml, packed, type_name, weight.numel()).view_as(weight)
        changed = (found != weight).float().mean()
        changes[type_name].append(((found - weight).norm() / weight.norm(), changed))
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight, linear.bias = nn.Parameter(found, requires_grad=False), layer.bias
        swap(student, name, linear)
    types = {
        type_name: {
            "layers": len(found),
            "relative_error": round(float(torch.tensor(found)[:, 0].mean()), 4),
            "weights_changed": round(float(torch.tensor(found)[:, 1].mean()), 4),
        }
        for type_name, found in changes.items()
    }
    refitted = evaluate_on_cache(student, cache, **place)
    for name in (kl_name(trained), "perplexity", "top1_agreement"):
        say(f"held-out {name}: {trained[name]:.4f} as trained, {refitted[name]:.4f} fitted anew")
    return {"trained": trained, "refitted": refitted, "types": types}


if __name__ == "__main__":
    raise SystemExit(run_command("python speedrun/refit.py", RefitConfig, act))
