"""What rounding does to the logits, against what it was predicted to do."""

import pytest
import torch

from qat.calibrate.rounding import PROBE_KL, Probe, measured_ratios
from qat.model.head import Tokens, hidden_states, logits_of
from qat.quant.fit import fit_weight
from qat.quant.spec import FORMATS
from tests.tiny import tiny_llama

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def exact_kl(model, token_ids, moved):
    """Return the mean KL after weights were moved, by name, from the definition."""
    before = logits_of(model, hidden_states(model, token_ids)).double().log_softmax(-1)
    kept = {name: model.get_submodule(name).weight.clone() for name in moved}
    for name, weight in moved.items():
        model.get_submodule(name).weight.copy_(weight)
    after = logits_of(model, hidden_states(model, token_ids)).double().log_softmax(-1)
    for name, weight in kept.items():
        model.get_submodule(name).weight.copy_(weight)
    return float((before.exp() * (before - after)).sum(-1).mean())


@torch.no_grad()
def test_ratios_are_those_of_the_kl_that_rounding_gives():
    """Linears of a kind are rounded together, by the share that should cost the probe's KL."""
    model, token_ids = tiny_llama().requires_grad_(False), torch.randint(0, 256, (8, 16))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spec = FORMATS["gguf:q4_0"]
    quantized = {name: fit_weight(model.get_submodule(name).weight, spec) for name in NAMES}
    whole = exact_kl(model, token_ids, {n: q.dequantize() for n, q in quantized.items()})
    probes = {name: Probe(q, whole / 4) for name, q in quantized.items()}
    other = "model.layers.0.mlp.up_proj"
    probes[other] = Probe(fit_weight(model.get_submodule(other).weight, spec), 0.0)
    ratios = measured_ratios(model, probes, Tokens(token_ids))
    share = (PROBE_KL / (whole / 2)) ** 0.5
    moved = {
        name: model.get_submodule(name).weight.lerp(q.dequantize(), share)
        for name, q in quantized.items()
    }
    assert ratios[NAMES[0]] == ratios[NAMES[1]]
    assert ratios[NAMES[0]] == pytest.approx(exact_kl(model, token_ids, moved) / PROBE_KL, rel=1e-3)
    assert ratios[other] == 1.0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
