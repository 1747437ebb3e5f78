import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.grids.packing import pack
from qat.quant.fit import fit_weight
from qat.quant.scheme import (
    LayerScheme,
    Scheme,
    largest_divisor,
    layer_kind,
    scheme_from_name,
    with_mlp,
)


@pytest.mark.parametrize(
    ("name", "mlp", "attention"),
    [
        ("q2a4", {"bits": 2}, {"bits": 4}),
        ("q4", {"bits": 4}, {"bits": 4}),
        ("q2a2", {"bits": 2}, {"bits": 2}),
        ("q2a4_g64", {"bits": 2, "group_size": 64}, {"bits": 4, "group_size": 64}),
        ("q4a4_r32", {"bits": 4, "rank": 32}, {"bits": 4, "rank": 32}),
        ("q4_r32", {"bits": 4, "rank": 32}, {"bits": 4, "rank": 32}),
    ],
)
def test_a_name_is_mlp_bits_then_attention_bits(name, mlp, attention):
    """A never means activations."""
    scheme = scheme_from_name(name)
    assert scheme.mlp == LayerScheme(**mlp)
    assert scheme.attention == LayerScheme(**attention)


@pytest.mark.parametrize(
    "name", ["", "q", "q9", "q1a4", "q2a4_", "q2a4_x3", "Q2A4", "q2a4_g", "q2 a4", "q4_r0"]
)
def test_an_unknown_name_is_refused_with_the_grammar(name):
    """The message shows names that work."""
    with pytest.raises(ValueError, match=r"is unknown; write q\{MLP bits\}.*q2a4_g64"):
        scheme_from_name(name)


@pytest.mark.parametrize("name", ["q2a4", "q4_r32", "q3a5_g16", "q2a4_int"])
def test_a_scheme_comes_back_from_json(name):
    """A checkpoint header says all of it."""
    scheme = with_mlp(scheme_from_name(name), "changed", codebook="balanced")
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_a_linear_is_known_by_the_last_part_of_its_name():
    """Never by a piece of it: `router_gate_proj` is not a gate."""
    assert layer_kind("model.layers.0.mlp.gate_proj") == "mlp"
    assert layer_kind("model.layers.0.self_attn.o_proj") == "attention"
    for name in ("lm_head", "model.q_proj.lora", "model.router_gate_proj", "mlp"):
        assert layer_kind(name) is None
        assert scheme_from_name("q2a4").layer(name) is None


@settings(max_examples=30, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(4, 9),
    groups=st.integers(1, 4),
    rank=st.sampled_from([0, 0, 1, 3]),
)
def test_the_size_counts_everything_that_ships(bits, rows, groups, rank):
    """Equal to packed indices, scales and codebook of a real fit; the last byte's padding apart."""
    scheme = LayerScheme(bits=bits, group_size=4, rank=rank)
    weight = torch.randn(rows, groups * 4)
    quantized = fit_weight(weight, scheme, num_rounds=1)
    scales = quantized.low_rank or (quantized.scale,)
    stored = 16 * (sum(part.numel() for part in scales) + len(quantized.codebook))
    padding = -weight.numel() * bits % 8
    packed = 8 * len(pack(quantized.indices, bits)) - padding
    assert scheme.size_bits(rows, groups * 4) == packed + stored


def test_a_fixed_codebook_ships_nothing():
    """Its values are known from its name."""
    learned, fixed = (LayerScheme(bits=2, codebook=kind) for kind in ("learned", "uniform"))
    assert learned.size_bits(8, 64) - fixed.size_bits(8, 64) == 16 * 4


def test_the_whole_row_may_share_a_scale():
    """Group size 0."""
    assert LayerScheme(bits=2, group_size=0).groups_of(100) == 1


def test_a_group_that_does_not_divide_names_one_that_does():
    """The remedy is a number that works."""
    with pytest.raises(ValueError, match="group size 32 does not divide a row of 72.*such as 24"):
        LayerScheme(bits=2).groups_of(72)
    assert largest_divisor(72, 32) == 24
    assert largest_divisor(7, 5) == 1


@pytest.mark.parametrize(
    "wrong", [{"bits": 1}, {"bits": 9}, {"bits": 2, "group_size": -1}, {"bits": 2, "rank": -1}]
)
def test_numbers_without_a_meaning_are_refused(wrong):
    """At once, not in the fit."""
    with pytest.raises(ValueError, match="outside 2..8|must be 0 or more"):
        LayerScheme(**wrong)
