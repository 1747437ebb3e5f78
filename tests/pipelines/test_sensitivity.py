"""The table of costs of a whole model."""

from pathlib import Path

import pytest
import torch

from qat.model.head import Tokens, hidden_states, logits_of
from qat.model.surgery import model_tensors
from qat.pipelines.place import Place
from qat.pipelines.quantize_config import InitStudentConfig
from qat.pipelines.sensitivity import coarse_probe, measure_costs, weight_info
from qat.quant.fit import fit_weight
from qat.quant.output_feedback import fit_in_turns
from qat.quant.spec import TensorSpec
from tests.tiny import FAMILY_TIED, TINY_MODELS

PLACE = InitStudentConfig(model="none", output=Path("none"), dtype="fp32", device="cpu")
FORMATS = [TensorSpec.from_name(name) for name in ("gguf:q4_0", "gguf:q8_0", "f16")]


@pytest.mark.recipe
@pytest.mark.parametrize(("family", "tied"), FAMILY_TIED)
def test_every_tensor_has_a_cost_and_the_model_stays(family, tied):
    """Costs fall with bits for linears, embedding and head; nothing in the model changes."""
    model = TINY_MODELS[family](tied=tied).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = model_tensors(model)
    names = [name for name, info in tensors.items() if info.is_quantizable]
    batches = [Tokens(part) for part in torch.randint(0, 256, (8, 16)).split(4)]
    costs = measure_costs(model, dict.fromkeys(names, FORMATS), batches, Place.of(PLACE)).costs
    assert costs.keys() == set(names)
    for found in costs.values():
        assert found["gguf:q4_0"] > 10 * found["gguf:q8_0"] > found["f16"] == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def model_and_text(num_sequences):
    """Return a tiny model, token ids, and these in batches."""
    model = TINY_MODELS["llama"]().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, 256, (num_sequences, 16), generator=generator)
    return model, token_ids, [Tokens(part) for part in token_ids.split(16)]


@pytest.mark.recipe
def test_costs_are_of_the_size_of_the_kl_that_they_predict():
    """The KL after a fit of one linear, in turns, is within a small factor of its cost."""
    model, token_ids, batches = model_and_text(96)
    name = "model.layers.0.self_attn.o_proj"
    specs = {f"{name}.weight": [TensorSpec.from_name("gguf:q4_0")]}
    found = measure_costs(model, specs | head_of(model), batches, Place.of(PLACE))
    predicted = found.costs[f"{name}.weight"]["gguf:q4_0"]
    before = logits_of(model, hidden_states(model, token_ids)).log_softmax(-1)
    weight = model.get_submodule(name).weight
    (spec,) = specs[f"{name}.weight"]
    fitted = fit_in_turns(
        [weight], [weight], found.grams.runs[name], lambda _rows, wanted: fit_weight(wanted, spec)
    )
    weight.copy_(fitted.dequantize())
    after = logits_of(model, hidden_states(model, token_ids)).log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    assert 0.4 < predicted / kl < 2.5


@pytest.mark.recipe
def test_what_fits_make_up_for_costs_less():
    """Outputs that the rest of the model adds up are fitted in turns, and costs know it."""
    model, _, batches = model_and_text(96)
    name = "model.layers.1.mlp.down_proj"
    specs = {f"{name}.weight": [TensorSpec.from_name("gguf:q4_0")]}
    found = measure_costs(model, specs | head_of(model), batches[:2], Place.of(PLACE), batches[2:])
    (gram,) = found.grams.runs[name]
    assert gram.shape == (64, 64)
    info = weight_info(model, name, gram.diagonal())
    plain, turns = (
        coarse_probe(info, specs[f"{name}.weight"], torch.eye(128), g) for g in ([], [gram])
    )
    assert plain.cost == turns.cost

    def cost(probe):
        error = probe.quantized.dequantize() - info.weight
        return float(((gram @ error) * error).sum())

    assert cost(turns) < cost(plain)


def head_of(model):
    """Return the embedding with one dense candidate: the walk goes on to the head."""
    return {"model.embed_tokens.weight": [TensorSpec.from_name("f16")]}
