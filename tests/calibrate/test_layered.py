import pytest
import torch

from qat.calibrate.decoder_layers import layer_calls
from qat.calibrate.layered import walk_second_moments
from qat.calibrate.statistics import collect_second_moments
from qat.model.head import Tokens
from qat.model.layered import NeedsWhole, open_layered
from qat.model.load import load_dense
from qat.model.surgery import dense_weights
from qat.runtime.device import Device
from tests.tiny import plan_of, save_tiny, tiny_model

SIZES = ((3, 7), (2, 5))


def batches():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(261, size, generator=generator) for size in SIZES]
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(3, 7)
    return [Tokens(ids[0], documents), Tokens(ids[1])]


@pytest.mark.recipe
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_a_walk_gives_the_moments_of_a_whole_pass(family, tmp_path):
    """To the bit, of the head's inputs as well, with documents packed and not."""
    save_tiny(tmp_path, tiny_model(family))
    model, layered = load_dense(tmp_path), open_layered(tmp_path, torch.float32)
    linears = dense_weights(model, plan_of(model))
    expected = collect_second_moments(model, linears, batches(), head="head")
    found = {}
    walk = walk_second_moments(
        layered, list(linears), batches(), head="head", device=Device.detect("cpu")
    )
    for layer, moments in walk:
        assert all(p.device.type == "meta" for p in layered.model.parameters())
        assert all(name.startswith(f"{layer}.") for name in moments if layer)
        found |= moments
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], moment) for name, moment in expected.items())


def test_a_model_that_does_more_between_its_layers_is_refused():
    """Its layers alone do not make its hidden states."""
    model = tiny_model("llama")
    layers = model.get_decoder().layers
    layers[1].register_forward_pre_hook(lambda _layer, inputs: (inputs[0] + 1, *inputs[1:]))
    with pytest.raises(NeedsWhole, match="LlamaForCausalLM does more between decoder layers"):
        layer_calls(model, batches()[1])
