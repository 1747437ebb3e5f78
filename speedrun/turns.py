"""What fitting outputs in turns, and weighting tokens, gains on text that no statistic has seen.

An error E of a weight moves the log-likelihood of a drawn label by g^T E x to first order, whose
mean square over tokens is twice what E costs. It takes neither inputs and gradients, nor tokens,
for independent, as the fits do: rows of the tables in log.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.cli.command import run_command
from qat.runtime.config import require_at_least
from qat.tracking.messages import say

if TYPE_CHECKING:
    from torch import Tensor

    from qat.quant.quantized_tensor import QuantizedTensor

FORMATS = {
    "self_attn.q_proj": "gguf:q2_0",
    "self_attn.o_proj": "gguf:q2_0",
    "mlp.gate_proj": "gguf:q2_0",
    "mlp.down_proj": "gguf:q2_k",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnsConfig:
    """Fit weights of some decoder layers in several ways and measure what their errors cost."""

    model: str
    """Hugging Face folder of a llama."""
    cache_dir: Path
    """Teacher cache: its text."""
    layers: tuple[int, ...] = (3, 15)
    """Decoder layers."""
    tokens: int = 12288
    """That H and G are known from."""
    test_tokens: int = 4096
    """That the errors are measured on."""

    def __post_init__(self) -> None:
        require_at_least(64, self, "tokens", "test_tokens")


@dataclass(frozen=True, slots=True)
class Seen:
    """Inputs, (N, I), and gradients at outputs, (N, O), of a linear."""

    inputs: "Tensor"
    gradients: "Tensor"


def compare(config: TurnsConfig) -> dict[str, Any]:
    """Record, fit, measure."""
    import torch

    from qat.model.load import load_dense
    from qat.pipelines.open_cache import open_teacher_cache
    from qat.pipelines.quantize import spread_batches
    from qat.quant.spec import TensorSpec

    cache = open_teacher_cache(config.cache_dir)
    model = load_dense(config.model, dtype=torch.float32).requires_grad_(False)
    count = (config.tokens + config.test_tokens) // cache.seq_len
    batches = spread_batches(cache, count)
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0))
    names = [f"model.layers.{layer}.{kind}" for layer in config.layers for kind in FORMATS]
    seen = record(model, names, [batches[place] for place in order])
    rows = {}
    for name in names:
        spec = TensorSpec.from_name(FORMATS[name.split(".", 3)[3]])
        weight = model.get_submodule(name).weight
        rows[name] = ratios(weight, seen[name], spec, config.test_tokens)
        say(f"{name} {spec.name}: {rows[name]}")
    return rows


def record(model: Any, names: list[str], batches: list) -> dict[str, Seen]:
    """Return what linears read, and the gradients of drawn labels at their outputs."""
    import torch

    from qat.calibrate.fisher import label_gradients

    inputs: dict[str, list] = {name: [] for name in names}
    gradients: dict[str, list] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _module, args, _out, name=name: inputs[name].append(args[0].flatten(0, -2))
        )
    passes = label_gradients(
        model, names, batches, lambda name, rows: gradients[name].append(rows.clone()), seed=0
    )
    say(f"gradients at {sum(one.num_tokens for one in passes)} tokens")
    return {n: Seen(torch.cat(inputs[n]).detach(), torch.cat(gradients[n])) for n in names}


def ratios(weight: "Tensor", seen: Seen, spec: Any, num_test: int) -> dict[str, float]:
    """Return the cost of each way of fitting over that of rows alone by the plain H."""
    from qat.quant import output_feedback
    from qat.quant.hessian import fit_with_hessian

    x, g = seen.inputs[:-num_test], seen.gradients[:-num_test]
    gram = g.T @ g / len(g)
    loud = g.square().sum(1).clamp_max(g.square().sum(1).quantile(0.99))
    hessians = {
        "plain": x.T @ x,
        "by g^2": (x * loud.unsqueeze(1)).T @ x,
        "by |g|": (x * loud.sqrt().unsqueeze(1)).T @ x,
    }

    def cost(quantized: "QuantizedTensor") -> float:
        error = quantized.dequantize() - weight
        moved = (seen.inputs[-num_test:] @ error.T) * seen.gradients[-num_test:]
        return float(moved.sum(1).square().mean())

    def fit_by(hessian: "Tensor") -> Callable[["Tensor", "Tensor"], "QuantizedTensor"]:
        return lambda rows, wanted: fit_with_hessian(
            rows, spec, hessian, target=wanted, num_sweeps=1
        )

    costs = {name: cost(fit_by(one)(weight, weight)) for name, one in hessians.items()}
    fit = fit_by(hessians["plain"])
    for damping in (1.0, 4.0):
        output_feedback.DAMPING = damping
        fitted = output_feedback.fit_in_turns([weight], [weight], [gram], fit)
        costs[f"turns, damping {damping:g}"] = cost(fitted)
    output_feedback.DAMPING = 1.0
    halves = [part.T @ part for part in g.chunk(2)]
    pairs = (halves, halves[::-1])
    left = sum(float(output_feedback.cost_after_turns(*pair)) for pair in pairs)
    found = {name: round(one / costs["plain"], 3) for name, one in costs.items()}
    return {**found, "by halves of G": round(left / float(sum(h.trace() for h in halves)), 3)}


if __name__ == "__main__":
    raise SystemExit(run_command("python speedrun/turns.py", TurnsConfig, compare))
