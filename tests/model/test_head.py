import logging

import pytest
import torch
from torch import nn

from qat.model import head
from qat.model.attention import widen_attention
from qat.model.head import (
    causal_masks,
    hidden_states,
    logit_scaling,
    logits_at,
    logits_of,
    require_separable_head,
    warn_unless_maskable,
)
from tests.tiny import FAMILIES, TINY_MODELS, tiny_llama, tiny_model

TOKEN_IDS = torch.arange(24).view(2, 12)
# Longer than the tiny Gemma's sliding window of 16, documents of one token among them.
PACKED_LENGTHS = [[5, 1, 20, 14], [40]]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_head_make_the_models_logits(family, tied):
    """Biases, factors and soft caps of every family are part of its head."""
    model = tiny_model(family, tied=tied)
    if (bias := model.get_output_embeddings().bias) is not None:
        bias.normal_()  # a random model has zeros
    hidden = hidden_states(model, TOKEN_IDS)
    assert hidden.shape == (2, 12, 64)
    expected = model(TOKEN_IDS).logits
    assert torch.allclose(logits_of(model, hidden), expected, rtol=0, atol=1e-5)
    flat, expected = hidden.flatten(0, 1), expected.flatten(0, 1)
    own = torch.randint(expected.shape[-1], (len(flat), 5))
    assert torch.allclose(logits_at(model, flat, own), expected.gather(-1, own), atol=1e-5)
    shared = torch.tensor([7, 0, 271])
    assert torch.allclose(logits_at(model, flat, shared), expected[:, shared], atol=1e-5)
    require_separable_head(model)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": None}),
        ("granite", {"logits_scaling": 1.0}),
        ("cohere", {"logit_scale": 1.0}),
    ],
)
def test_what_a_head_does_to_its_output_shows(family, changes):
    """The tested models would have other logits without their factor or cap."""
    scaled, plain = tiny_model(family), tiny_model(family, **changes)
    assert logit_scaling(scaled.config) != (None, None) == logit_scaling(plain.config)
    assert not torch.allclose(scaled(TOKEN_IDS).logits, plain(TOKEN_IDS).logits, rtol=0.1)


def test_a_composite_config_scales_as_its_text_part():
    """The field is in the nested config, where the model's own forward reads it as well."""

    class Composite:
        def get_text_config(self):
            return tiny_model("granite").config

    assert logit_scaling(Composite()) == (0.25, None)


def test_an_unknown_change_after_the_head_is_refused():
    """A family that scales its logits in a way of its own is named, not measured wrongly."""

    class Doubled(type(tiny_llama())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            return output.__class__(logits=2 * output.logits)

    model = tiny_llama()
    model.__class__ = Doubled
    with pytest.raises(ValueError, match="models of type llama change their logits"):
        require_separable_head(model)


def test_a_heads_bias_is_part_of_its_rows():
    """Each token's own number."""
    model = tiny_llama(tied=False)
    model.lm_head = nn.Linear(64, 272)
    hidden, own = torch.randn(3, 64), torch.randint(272, (3, 5))
    expected = model.lm_head(hidden).gather(-1, own)
    assert torch.allclose(logits_at(model, hidden, own), expected, atol=1e-5)


def packed():
    """Token and document ids, (2, 40), of two blocks."""
    documents = [
        [number for number, length in enumerate(lengths) for _ in range(length)]
        for lengths in PACKED_LENGTHS
    ]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(272, (2, 40), generator=generator), torch.tensor(documents)


def each_alone(model, token_ids):
    """Hidden states of every document in a pass of its own, put in a row."""
    rows = [
        torch.cat([hidden_states(model, part[None])[0] for part in row.split(lengths)])
        for row, lengths in zip(token_ids, PACKED_LENGTHS, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "qat_sdpa"])
@pytest.mark.parametrize("family", TINY_MODELS)
def test_packed_documents_are_as_if_alone(family, attention):
    """Whatever else is in their block, before them or after them."""
    model = TINY_MODELS[family]()
    model.set_attn_implementation("sdpa" if attention == "qat_sdpa" else attention)
    if attention == "qat_sdpa":
        widen_attention(model)
    token_ids, document_ids = packed()
    separate = hidden_states(model, token_ids, document_ids)
    torch.testing.assert_close(separate, each_alone(model, token_ids), atol=1e-5, rtol=1e-5)
    joined = hidden_states(model, token_ids)
    assert not torch.allclose(separate[0], joined[0], atol=1e-3)
    torch.testing.assert_close(separate[1], joined[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", TINY_MODELS)
def test_masks_of_documents_need_no_look_at_values(family, monkeypatch):
    """A traced device cannot look: the masks that it is given do the same."""
    model = TINY_MODELS[family]()
    token_ids, document_ids = packed()
    expected = hidden_states(model, token_ids, document_ids)
    monkeypatch.setattr(head, "is_traced", lambda _device: True)
    found = hidden_states(model, token_ids, document_ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    masks = causal_masks(model.get_decoder().config, token_ids, document_ids)
    for mask in masks.values() if isinstance(masks, dict) else [masks]:
        assert mask.shape == (2, 1, 40, 40)


def test_one_document_a_block_makes_no_mask():
    """The kernel's own causal mask is the faster one."""
    model, masks = tiny_llama(), []
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(
        lambda _module, _args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    hidden_states(model, TOKEN_IDS, torch.tensor([[3] * 12, [4] * 12]))
    assert masks == [None]


def test_attention_without_masks_is_told_once(caplog):
    """Documents then see each other, and nobody should find out from the numbers."""
    warn_unless_maskable.cache_clear()
    with caplog.at_level(logging.WARNING):
        for attention in ("sdpa", "flash_attention_2", "flash_attention_2"):
            warn_unless_maskable(attention)
    assert [record.args for record in caplog.records] == [("flash_attention_2",)]
