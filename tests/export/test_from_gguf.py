"""Any GGUF file comes back as the model that its bytes stand for, and says what it holds."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from qat.export.from_gguf import gguf_contents, read_gguf_model, type_in_name
from qat.export.gguf_file import read_header
from qat.export.to_gguf import export_to_gguf
from tests.tiny import moved_student, save_tiny, tiny_model

gguf = pytest.importorskip("gguf")
TOKENS = torch.arange(2 * 24).view(2, 24) * 5 % 250
KINDS = gguf.GGMLQuantizationType


def dense_file(folder, family="llama", **changes):
    """Write a tiny model as a folder and as a dense GGUF file; return model and paths."""
    model = tiny_model(family, **changes)
    base = save_tiny(folder / "base", model)
    path = folder / "model.gguf"
    export_to_gguf(model, path, text_source=base, dtype=torch.float32)
    return model, base, path


def rewrite(path, *, kind_of=lambda name, shape: None, skip=(), keys=None, other=None):
    """Write a GGUF file anew by the package: matrices of other types, keys and tensors changed."""
    reader = gguf.GGUFReader(path)
    made = path.with_name("made.gguf")
    writer = gguf.GGUFWriter(made, str(reader.fields["general.architecture"].contents()))
    keys, other, generator = keys or {}, other or {}, np.random.default_rng(0)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = keys.get(name, field.contents())
        kinds = (*field.types, None)[:2]
        writer.add_key_value(name, value, kinds[0], sub_type=kinds[1])
    for tensor in reader.tensors:
        values = other.get(tensor.name, np.array(tensor.data))
        kind = kind_of(tensor.name, values.shape) if values.ndim > 1 else None
        if tensor.name in skip:
            continue
        if kind is None:
            writer.add_tensor(tensor.name, values)
            continue
        try:
            packed = gguf.quantize(values, kind)
        except NotImplementedError:  # any bytes are blocks; 0xBF keeps float16 scales below 2
            block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
            size = (values.shape[0], values.shape[1] // block * num_bytes)
            packed = generator.integers(0, 256, size, dtype=np.uint8) & 0xBF
        writer.add_tensor(tensor.name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_dense_file_comes_back_whole(tmp_path, family, tied):
    """Every parameter to the bit: names, llama's order of rows, biases, tied or own head."""
    model, base, path = dense_file(tmp_path, family, tied=tied)
    found = read_gguf_model(path, base)
    expected = dict(model.named_parameters())
    assert expected.keys() == dict(found.named_parameters()).keys()
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, expected[name]), name
        assert not parameter.requires_grad
    assert torch.allclose(found(TOKENS).logits, model(TOKENS).logits, atol=1e-5)


def test_a_packed_student_comes_back_as_it_computes(tmp_path, text_source):
    """Also types that the gguf package lacks; a file whose base has another head is untied."""
    student = moved_student("llama", "gguf:q2_0+gguf:q4_0, embed=gguf:q8_0", tied=False)
    export_to_gguf(student, tmp_path / "out.gguf", text_source=text_source, head="f32")
    found = read_gguf_model(tmp_path / "out.gguf", text_source)  # its config is tied
    assert torch.allclose(found(TOKENS).logits, student(TOKENS).logits, atol=1e-4)
    contents = gguf_contents(tmp_path / "out.gguf")
    assert contents.types["Q2_0"] == 6
    assert contents.fallbacks == {}


@pytest.mark.recipe
def test_types_of_other_programs_are_read_as_transformers_reads_them(tmp_path):
    """The reference is transformers' own reader, with its names and its order of rows."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    _, base, path = dense_file(tmp_path, **sizes, initializer_range=0.05)
    kinds = [KINDS.Q5_0, KINDS.Q3_K, KINDS.IQ2_XXS, KINDS.Q6_K, KINDS.IQ4_XS, KINDS.Q4_1]

    def kind_of(name, _shape):
        return KINDS.F16 if "embd" in name else kinds[hash_of(name) % len(kinds)]

    made = rewrite(path, kind_of=kind_of)
    assert len(gguf_contents(made).types) > len(kinds)
    found = read_gguf_model(made, base).state_dict()
    reference = AutoModelForCausalLM.from_pretrained(
        str(made.parent),
        gguf_file=made.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).state_dict()
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        assert torch.equal(found[name], tensor), name


def hash_of(name):
    """Return a number that is the same in every process."""
    return sum(map(ord, name))


def test_silent_fallbacks_are_named(tmp_path):
    """A file that says Q3_K_M whose rows of 64 and 128 could not be Q3_K, and holds other types."""
    *_, path = dense_file(tmp_path)
    narrow = {"attn_v": KINDS.Q5_0, "token_embd": KINDS.Q8_0}

    def kind_of(name, _shape):
        return next((kind for part, kind in narrow.items() if part in name), KINDS.Q4_0)

    made = rewrite(path, kind_of=kind_of, keys={"general.file_type": 12})
    made = made.rename(tmp_path / "tiny.Q4_K_M.gguf")
    contents = gguf_contents(made)
    assert (contents.promised, contents.named) == ("Q3_K_M", "Q4_K_M")
    assert contents.fallbacks == {"Q8_0": 1, "Q4_0": 12, "Q5_0": 2}
    assert contents.odd_rows == (64, 128)
    assert contents.types == {"Q8_0": 1, "Q4_0": 12, "Q5_0": 2, "F32": 5}
    assert contents.file_bytes == made.stat().st_size
    note = contents.note()
    assert "its name says Q4_K_M, its general.file_type Q3_K_M" in note
    assert "15 matrices are not of Q3_K_M types, whose blocks do not divide rows of 64 and" in note


def test_whole_blocks_are_no_fallback(tmp_path):
    """A mixture uses larger types on purpose where rows are multiples of 256; Q8_0 takes all."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    *_, path = dense_file(tmp_path, **sizes)
    keys = {"general.file_type": 12}
    made = rewrite(path, kind_of=lambda name, shape: KINDS.Q5_0, keys=keys)
    assert gguf_contents(made).fallbacks == {}
    assert gguf_contents(path).promised == "F32"
    assert gguf_contents(path).note() == "holds 20 F32; 32.00 bits a weight"


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("SmolLM2-135M-Instruct-Q4_K_M", "Q4_K_M"),
        ("model.iq4_nl", "IQ4_NL"),
        ("Q4_0_4_4", None),
        ("model-UD-IQ2_XXS", "IQ2_XXS"),
        ("q2_0", "Q2_0"),
        ("model", None),
    ],
)
def test_names_of_files_hold_types(stem, expected):
    """Whole words only: an IQ4_NL file promises no other type."""
    assert type_in_name(stem) == expected


@pytest.mark.recipe
def test_what_is_of_another_model_is_refused_in_one_line(tmp_path):
    """Missing, additional and misshapen tensors, NaN, other heads: never a model that half fits."""
    model, base, path = dense_file(tmp_path)
    weight = np.zeros((64, 64), dtype=np.float32)
    changes = {
        "blk.1.ffn_up.weight is not in the file": {"skip": ["blk.1.ffn_up.weight"]},
        r"\(64, 64\), not \(128, 64\)": {"other": {"blk.1.ffn_up.weight": weight}},
        "NaN": {"other": {"blk.0.attn_q.weight": weight + np.nan}},
        "head_count is 8, not 4": {"keys": {"llama.attention.head_count": 8}},
        "freq_base is 500000": {"keys": {"llama.rope.freq_base": 5e5}},
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=message) as error:
            read_gguf_model(rewrite(path, **change), base)
        assert "\n" not in str(error.value)
    larger = save_tiny(tmp_path / "larger", tiny_model("llama", num_hidden_layers=1))
    with pytest.raises(ValueError, match="blk.1.attn_k.weight is in the file only"):
        read_gguf_model(path, larger)
    other = save_tiny(tmp_path / "qwen", tiny_model("qwen3"))
    with pytest.raises(ValueError, match="general.architecture is llama, not qwen3"):
        read_gguf_model(path, other)
    assert len(read_header(path).tensors) == len(list(model.parameters()))
