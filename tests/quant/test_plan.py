"""Plans: the grammar of presets and rules, and what they give each tensor of a model."""

import json
import re

import pytest

from qat.quant.plan import (
    OLD_FORMATS,
    TensorInfo,
    kind_specs,
    parse_plan,
    plan_from_dict,
    read_plan,
    tensor_kind,
)
from qat.quant.spec import F16, F32, FORMATS, make_spec

INT4, LUT2 = make_spec(4, codebook="int"), make_spec(2)
UP = "model.layers.{}.mlp.up_proj.weight"


def tensors(*, is_tied: bool = True) -> dict[str, TensorInfo]:
    """Return the parameters of a model of two layers; a tied head has no entry of its own."""
    aliases = ("lm_head.weight",) if is_tied else ()
    found = {
        "model.embed_tokens.weight": TensorInfo(
            shape=(272, 64), kind="embedding", is_quantizable=True, aliases=aliases
        )
    }
    for layer in range(2):
        for name, shape, kind in (
            ("self_attn.q_proj", (64, 64), "attention"),
            ("mlp.up_proj", (128, 64), "mlp"),
            ("mlp.down_proj", (64, 128), "mlp"),
        ):
            found[f"model.layers.{layer}.{name}.weight"] = TensorInfo(
                shape=shape, kind=kind, is_quantizable=True
            )
        found[f"model.layers.{layer}.input_layernorm.weight"] = TensorInfo(shape=(64,))
    if not is_tied:
        found["lm_head.weight"] = TensorInfo(shape=(272, 64), kind="head", is_quantizable=True)
    return found


@pytest.mark.parametrize(
    ("name", "mlp", "attention"),
    [
        ("q2a4", {"bits": 2}, {"bits": 4}),
        ("q4", {"bits": 4}, {"bits": 4}),
        ("q2a2", {"bits": 2}, {"bits": 2}),
        ("q2a4_g64", {"bits": 2, "group_size": 64}, {"bits": 4, "group_size": 64}),
        ("q4a4_r32", {"bits": 4, "rank": 32}, {"bits": 4, "rank": 32}),
        ("q4_r32", {"bits": 4, "rank": 32}, {"bits": 4, "rank": 32}),
        (
            "q2a4_int",
            {"bits": 2, "group_size": 64, "codebook": "int"},
            {"bits": 4, "group_size": 32, "codebook": "int"},
        ),
    ],
)
def test_a_preset_is_mlp_bits_then_attention_bits(name, mlp, attention):
    """A never means activations."""
    rules = parse_plan(name)
    assert rules.spec_of_kind("mlp") == make_spec(**mlp)
    assert rules.spec_of_kind("attention") == make_spec(**attention)


@pytest.mark.parametrize(
    "name", ["", "q", "q9", "q1a4", "q2a4_", "q2a4_x3", "Q2A4", "q2a4_g", "q2 a4", "q4_r0"]
)
def test_an_unknown_name_is_refused_with_the_grammar(name):
    """The message shows names that work."""
    with pytest.raises(ValueError, match=r"is unknown; write q\{MLP bits\}.*q2a4_g64"):
        parse_plan(name)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_a_plan_of_all_decoder_linears(name):
    """Its own name, unlike `q2a4`, says nothing of kinds."""
    rules = parse_plan(name)
    assert rules.name == name
    assert rules.spec_of_kind("mlp") == rules.spec_of_kind("attention") == FORMATS[name]


def test_two_formats_are_mlp_and_attention():
    """The order of every other name; names of version 0.1.0 still stand for what they did."""
    for name in ("gguf:q2_0+gguf:q4_0", "gguf-q2_0+gguf-q4_0"):
        rules = parse_plan(name)
        assert rules.spec_of_kind("mlp") == make_spec(bits=2, group_size=64, codebook="int")
        assert rules.spec_of_kind("attention") == INT4
    assert parse_plan("mlx-4bit-g32").spec_of_kind("mlp") == OLD_FORMATS["mlx-4bit-g32"]


def test_deploy_is_the_pair_with_scales_of_both_dtypes():
    """One student for GGUF, MLX and compressed-tensors."""
    rules = parse_plan("deploy")
    mlp, attention = rules.spec_of_kind("mlp"), rules.spec_of_kind("attention")
    assert (mlp.bits, mlp.group_size) == (2, 64)
    assert (attention.bits, attention.group_size) == (4, 32)
    assert mlp.stored_dtype == attention.stored_dtype == "bfloat16"


@pytest.mark.parametrize("name", ["gguf:q4_0+q4a4", "gguf:q4_0+", "deploy+gguf:q4_0", "gguf:q4_9"])
def test_a_name_that_is_no_format_is_refused_with_the_list(name):
    """The message shows names that work."""
    with pytest.raises(ValueError, match=re.escape(name) + r".*is unknown.*gguf:q4_0, gguf:q2_0"):
        parse_plan(name)


def test_the_last_rule_that_matches_decides():
    """Whatever is wider or narrower."""
    plan = parse_plan("q2a4, layers.0.*=int4-g32, *.down_proj=affine4-g64").resolve(tensors())
    assert plan.specs[UP.format(0)] == INT4
    assert plan.specs[UP.format(1)] == LUT2
    assert plan.specs["model.layers.0.self_attn.q_proj.weight"] == INT4
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert plan.specs[name].name == "affine4-g64"
    reverse = parse_plan("*.down_proj=affine4-g64, q2a4").resolve(tensors())
    assert reverse.specs["model.layers.0.mlp.down_proj.weight"] == LUT2


def test_what_no_rule_names_stays_dense():
    """Vectors in float32, matrices in float16; norms match no pattern."""
    plan = parse_plan("q2a4, layers.0.*=int4-g32").resolve(tensors())
    assert plan.specs["model.embed_tokens.weight"] == F16
    assert plan.specs["model.layers.0.input_layernorm.weight"] == F32
    assert "model.embed_tokens" not in plan.quantized


@pytest.mark.parametrize("is_tied", [True, False])
def test_embedding_and_head_have_names_of_their_own(is_tied):
    """`head` means the embedding where the two are tied, which is one entry."""
    plan = parse_plan("q2a4, head=int4-g32").resolve(tensors(is_tied=is_tied))
    embedding = plan.specs["model.embed_tokens.weight"]
    assert embedding == (INT4 if is_tied else F16)
    assert ("lm_head.weight" in plan.specs) is not is_tied
    if not is_tied:
        assert plan.specs["lm_head.weight"] == INT4
    by_name = parse_plan("q2a4, lm_head=int4-g32").resolve(tensors(is_tied=is_tied))
    assert by_name.specs == plan.specs
    embed = parse_plan("q2a4, embed=int4-g32").resolve(tensors(is_tied=is_tied))
    assert embed.specs["model.embed_tokens.weight"] == INT4


@pytest.mark.parametrize("is_tied", [True, False])
def test_linears_leave_embedding_and_head_and_all_takes_them(is_tied):
    """Two patterns for wholes."""
    linears = parse_plan("linears=int4-g32").resolve(tensors(is_tied=is_tied))
    everything = parse_plan("all=int4-g32").resolve(tensors(is_tied=is_tied))
    assert len(linears.quantized) == 6
    assert len(everything.quantized) == (7 if is_tied else 8)


@pytest.mark.parametrize(
    "text", ["q2a4, layers.7.*=int4-g32", "q2a4, *layernorm*=int4-g32", "q2a4, emebd=int4-g32"]
)
def test_a_rule_that_matches_nothing_is_refused(text):
    """A slip in a name would else leave a layer in another format, unnoticed."""
    rule = text.partition(", ")[2]
    with pytest.raises(ValueError, match=re.escape(rule) + ".*matches no weight.*embed_tokens"):
        parse_plan(text).resolve(tensors())


def test_a_format_that_does_not_fit_names_rule_and_tensor():
    """And a number that would."""
    with pytest.raises(ValueError, match=r"mlp=lut4-g48 does not fit model\.layers\.0\.mlp.*32"):
        parse_plan("q4_g48").resolve(tensors())


def test_a_rule_that_another_overrides_need_not_fit():
    """A preset of groups of 32, where one kind of row is no multiple of them."""
    text = "mlp=lut4-g48, mlp=lut4-g32, attention=lut4-g48, attention=lut4-g16"
    plan = parse_plan(text).resolve(tensors())
    assert {spec.name for spec in plan.quantized.values()} == {"lut4-g32", "lut4-g16"}


@pytest.mark.parametrize(
    "text", ["q2a4", "q4_r32", "deploy, embed=gguf:q4_0", "q2a4_int, layers.0.*=affine4-g64-bf16"]
)
def test_a_plan_comes_back_from_json(text, tmp_path):
    """A header says all of it, and a file does as `--plan`."""
    plan = parse_plan(text).resolve(tensors())
    written = json.dumps(plan.to_dict())
    assert plan_from_dict(json.loads(written), tensors()) == plan
    (tmp_path / "plan.json").write_text(written)
    assert read_plan(str(tmp_path / "plan.json"), tensors()) == plan


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    """With the command that writes one."""
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON.*make it again"):
        read_plan(str(tmp_path / "plan.json"), tensors())


def test_a_plan_of_another_model_is_refused():
    """Naming a tensor that only one of them has."""
    values = parse_plan("q2a4").resolve(tensors()).to_dict()
    with pytest.raises(ValueError, match=r"of another model: lm_head.weight is in the model only"):
        plan_from_dict(values, tensors(is_tied=False))
    values["tensors"]["model.layers.0.input_layernorm.weight"] = "int4-row"
    with pytest.raises(ValueError, match="quantizes .*input_layernorm.weight, which must stay"):
        plan_from_dict(values, tensors())


def scheme(name: str, mlp: dict, attention: dict) -> dict:
    """Return a scheme as headers of version 0.1.0 hold it."""
    whole = {
        "bits": 4,
        "group_size": 32,
        "rank": 0,
        "codebook": "learned",
        "stored_dtype": "float16",
        "scale_floor": None,
    }
    return {"name": name, "mlp": {**whole, **mlp}, "attention": {**whole, **attention}}


def test_schemes_of_0_1_0_stand_for_the_same_formats():
    """Layers of each kind get what the header says, floors among it; the rest stays dense."""
    values = scheme("q2a4", {"bits": 2, "scale_floor": 1e-4}, {"rank": 8})
    plan = plan_from_dict(values, tensors())
    assert plan.name == "q2a4"
    assert plan.specs[UP.format(1)] == make_spec(2, floor=1e-4)
    assert plan.spec_of_kind("attention") == make_spec(4, rank=8)
    assert plan.specs["model.embed_tokens.weight"] == F16
    assert kind_specs(values) == {
        "mlp": make_spec(2, floor=1e-4),
        "attention": make_spec(4, rank=8),
    }
    plain = plan_from_dict(scheme("q2a4", {"bits": 2}, {}), tensors())
    assert plain == parse_plan("q2a4").resolve(tensors())
    assert kind_specs(plain.to_dict()) == kind_specs(scheme("q2a4", {"bits": 2}, {}))


@pytest.mark.parametrize("change", [{"bits": 99}, {"colour": "red"}])
def test_a_scheme_that_cannot_be_read_is_refused(change):
    """Instead of a student of other formats."""
    with pytest.raises(ValueError, match=r"outside 2..8|other fields.*colour.*make the checkpoint"):
        plan_from_dict(scheme("q2a4", change, {}), tensors())


def test_kinds_of_several_formats_have_none():
    """What is true of some layers only is not said of the kind."""
    plan = parse_plan("q2a4, layers.0.*=int8-g32").resolve(tensors())
    assert plan.spec_of_kind("mlp") is None
    assert kind_specs(plan.to_dict()) == {"mlp": None, "attention": None}


def test_the_table_and_the_bytes_are_sums_over_tensors():
    """Tensors of one pattern and format share a row; ties count once."""
    plan = parse_plan("q2a4, embed=int4-g32").resolve(tensors())
    rows = plan.rows()
    assert sum(row["bytes"] for row in rows) == plan.file_bytes
    assert sum(row["count"] for row in rows) == len(tensors())
    by_name = {row["tensors"]: row for row in rows}
    assert by_name["embed_tokens"]["bytes"] == 272 * 64 // 2 + 272 * 2 * 2
    assert by_name["layers.*.mlp.up_proj"]["count"] == 2
    assert plan.num_weights == 272 * 64 + 2 * (64 * 64 + 2 * 128 * 64 + 64)


def test_a_linear_is_known_by_the_last_part_of_its_name():
    """Never by a piece of it: `router_gate_proj` is not a gate."""
    assert tensor_kind("model.layers.0.mlp.gate_proj") == "mlp"
    assert tensor_kind("model.layers.0.self_attn.o_proj") == "attention"
    assert tensor_kind("lm_head") == "head"
    for name in ("model.q_proj.lora", "model.router_gate_proj", "mlp"):
        assert tensor_kind(name) == "other"
