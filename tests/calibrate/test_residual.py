import pytest
import torch

from qat.calibrate.residual import multiplier_of_sum, residual_writes
from tests.tiny import FAMILIES, tiny_model

NOT_ADDED = {"gemma2", "gemma3", "olmo2"}  # the output is normed first
TOGETHER = {"phi", "cohere"}  # attention and MLP are added at once


def writes_of(model):
    """Return what is found in a model's first decoder layer, on random tokens."""
    decoder = model.get_decoder()
    layer, calls = decoder.layers[0], []
    hook = layer.register_forward_pre_hook(
        lambda _module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    model(torch.randint(0, 100, (2, 9)), use_cache=False)
    hook.remove()
    (args, kwargs), linears = (
        calls[0],
        [name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)],
    )

    def run():
        output = layer(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    return residual_writes(layer, linears, run)


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_that_write_into_the_stream_are_found(family):
    """The last of attention and of the MLP where their outputs are added as they are."""
    found = writes_of(tiny_model(family))
    if family in NOT_ADDED | TOGETHER:
        assert not found
    else:
        assert set(found) == {"self_attn.o_proj", "mlp.down_proj"}
        assert found["self_attn.o_proj"].after == "post_attention_layernorm"
        assert found["mlp.down_proj"].before == "post_attention_layernorm"
        assert found["mlp.down_proj"].after == ""
        assert all(write.multiplier == pytest.approx(1, rel=1e-3) for write in found.values())


def test_a_multiplier_of_the_stream_is_found():
    """As Granite's config has one."""
    found = writes_of(tiny_model("granite", residual_multiplier=0.25))
    assert [write.multiplier for write in found.values()] == pytest.approx([0.25] * 2, rel=1e-3)


def test_a_sum_is_told_from_anything_else():
    """Also of outputs that hardly move the stream, beside a token a thousand times as loud."""
    stream, output = torch.randn(2, 8, 64), 1e-3 * torch.randn(2, 8, 64)
    stream[:, 0] *= 1000
    output[:, 0] *= 1000
    other = 0.01 * torch.randn_like(output)
    other[:, 0] = 0  # the loud token alone would take it for a sum
    assert multiplier_of_sum(stream, stream + output, output) == pytest.approx(1, rel=1e-3)
    assert multiplier_of_sum(stream, stream + output + other, output) is None
    assert multiplier_of_sum(stream, stream + output, torch.randn_like(output)) is None
    assert multiplier_of_sum(stream, stream, output) is None
    assert multiplier_of_sum(stream, stream + output, output[..., :32]) is None
