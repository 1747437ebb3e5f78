"""The Fisher information of outputs against its definition, label by label."""

import pytest
import torch

from qat.calibrate.fisher import Grams, even_runs, output_fisher
from qat.model.head import hidden_states, logits_of
from tests.tiny import TINY_MODELS, tiny_llama, tiny_model


def exact_moments(model, token_ids, name):
    """Return sum over labels of p_y g_y g_y^T at a module's output, of one-token sequences."""
    outputs = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda _module, _inputs, out: outputs.append(out.requires_grad_())
    )
    logits = logits_of(model, hidden_states(model, token_ids))[0, 0]
    hook.remove()
    shares = logits.softmax(-1).detach()
    moment = 0.0
    for label, share in enumerate(shares):
        (gradient,) = torch.autograd.grad(
            -logits.log_softmax(-1)[label], outputs[0], retain_graph=True
        )
        moment = moment + share * gradient.flatten().outer(gradient.flatten())
    return moment, shares


def scale_of(model):
    """Return what an embedding multiplies its rows by, as Gemma 3's does."""
    return float(getattr(model.get_input_embeddings(), "embed_scale", 1.0))


@pytest.mark.recipe
@pytest.mark.parametrize("family", TINY_MODELS)
def test_drawn_labels_give_the_expected_moments(family):
    """Second moments of drawn gradients approach those over all labels."""
    tokens = {"vocab_size": 64, "eos_token_id": 1, "pad_token_id": 0}  # a gradient for each
    model = TINY_MODELS[family](**tokens).requires_grad_(False)
    token_ids = torch.tensor([[7]])
    name = "model.layers.1.mlp.down_proj"
    batches = [token_ids.expand(2048, 1)] * 4
    found = output_fisher(model, [name], batches)
    exact, shares = exact_moments(model, token_ids, name)
    torch.testing.assert_close(found.linears[name], exact.diagonal(), rtol=0.25, atol=1e-6)
    full, _ = exact_moments(model, token_ids, "model.embed_tokens")
    full = full * scale_of(model) ** 2
    assert (found.embedding - full).norm() < 0.15 * full.norm()
    torch.testing.assert_close(found.token_shares, shares)
    torch.testing.assert_close(found.head, shares - shares.square())


def test_grams_are_the_moments_of_pairs_of_outputs():
    """Their diagonal is that of `output_fisher`; runs are blocks of the whole."""
    model = tiny_llama().requires_grad_(False)
    batches = [torch.randint(0, 256, (4, 8)) for _ in range(2)]
    name = "model.layers.0.self_attn.q_proj"
    whole, runs = Grams.of(model, [name]), Grams({name: [24, 40]})
    fisher = output_fisher(model, [name], batches, grams=whole)
    runs.add_text(model, batches)
    torch.testing.assert_close(whole.embedding_mean(), fisher.embedding)
    torch.testing.assert_close(runs.embedding_mean(), fisher.embedding)
    (gram,), (first, second) = whole.means()[name], runs.means()[name]
    torch.testing.assert_close(gram.diagonal(), fisher.linears[name])
    torch.testing.assert_close(first, gram[:24, :24])
    torch.testing.assert_close(second, gram[24:, 24:])
    assert torch.linalg.eigvalsh(gram).min() > -1e-6 * gram.diagonal().max()
    runs.add_text(model, batches)  # the same again: means stay
    torch.testing.assert_close(runs.means()[name][0], first)


@pytest.mark.parametrize(
    ("num_outputs", "sizes"), [(1, [1]), (1024, [1024]), (2500, [833, 833, 834])]
)
def test_wide_outputs_count_together_in_runs(num_outputs, sizes):
    """Of nearly one length, that together are all."""
    assert even_runs(num_outputs) == sizes


def test_outputs_that_are_noise_to_each_other_take_no_turns():
    """Those that move together do so on the other half of the text."""
    grams = Grams({"a": [64], "b": [64]})
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(3, 64, generator=generator)
    for _ in range(8):
        alone = torch.randn(32, 64, generator=generator)
        grams.add("a", alone)
        grams.add("b", alone + torch.randn(32, 3, generator=generator) @ shared)
    grams.num_tokens = 256
    found = grams.of_paying_turns()
    assert list(found) == ["b"]
    torch.testing.assert_close(found["b"], grams.means()["b"])


def test_predicts_the_kl_of_a_small_error():
    """1/2 e^T F e of random errors in a linear's outputs is the KL that they cause, on average."""
    model = tiny_llama().requires_grad_(False)
    token_ids = torch.randint(0, 256, (64, 16), generator=torch.Generator().manual_seed(1))
    name = "model.layers.0.self_attn.o_proj"
    found = output_fisher(model, [name], [token_ids] * 4)
    before = logits_of(model, hidden_states(model, token_ids)).log_softmax(-1)
    size = 0.02
    noise = size * torch.randn(64, 16, 64, generator=torch.Generator().manual_seed(2))
    hook = model.get_submodule(name).register_forward_hook(lambda _m, _i, out: out + noise)
    after = logits_of(model, hidden_states(model, token_ids)).log_softmax(-1)
    hook.remove()
    kl = (before.exp() * (before - after)).sum(-1).mean()
    predicted = float(found.linears[name].sum()) * size**2 / 2
    assert 0.7 < predicted / float(kl) < 1.4


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_predicts_what_errors_of_embedding_rows_cost_as_inputs(family):
    """Of the rows themselves, also where the embedding scales what it reads."""
    model = tiny_model(family)
    token_ids = torch.randint(0, 256, (64, 16), generator=torch.Generator().manual_seed(1))
    found = output_fisher(model, [], [token_ids] * 4)
    before = logits_of(model, hidden_states(model, token_ids)).log_softmax(-1)
    size = 0.01 * float(model.get_input_embeddings().weight.std())
    noise = torch.randn(64, 16, 64, generator=torch.Generator().manual_seed(2)) * size
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _m, _i, out: out + scale_of(model) * noise
    )
    after = logits_of(model, hidden_states(model, token_ids)).log_softmax(-1)
    hook.remove()
    kl = (before.exp() * (before - after)).double().sum(-1).mean()
    assert float(found.embedding.trace()) * size**2 / 2 == pytest.approx(float(kl), rel=0.4)


def test_seed_and_text():
    """One seed gives one result; no text gives an error."""
    model = tiny_llama().requires_grad_(False)
    batches = [torch.randint(0, 256, (4, 8))]
    name = "model.layers.0.mlp.up_proj"
    first, again = (output_fisher(model, [name], batches, seed=3) for _ in range(2))
    assert torch.equal(first.linears[name], again.linears[name])
    with pytest.raises(ValueError, match="no tokens"):
        output_fisher(model, [name], [])


def test_gradients_that_are_not_finite_are_refused_before_they_are_factored():
    """The message names the remedy, where a factor of NaN would end in a traceback."""
    grams = Grams({"a": [4]})
    for value in (1.0, float("nan")):
        grams.add("a", torch.full((3, 4), value))
    with pytest.raises(ValueError, match="try --dtype fp32"):
        grams.of_paying_turns()
