import json
import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qat.model.checkpoint import (
    CheckpointHeader,
    bits_per_weight,
    dense_tensors,
    is_checkpoint,
    read_checkpoint,
    read_header,
    smallest_lossless,
    write_checkpoint,
)
from qat.model.surgery import quantized_layers, thaw_indices
from qat.quant.spec import make_spec
from qat.storage.files import sha256_of_file
from tests.tiny import (
    FAMILY_TIED,
    TINY_MODELS,
    plan_of,
    save_student,
    save_tiny,
    tiny_llama,
    tiny_student,
)

TOKEN_IDS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder that tokenizer files come from."""
    return save_tiny(tmp_path_factory.mktemp("base"), tiny_llama())


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    """A student and its checkpoint; tests that change it take a copy."""
    student = tiny_student()
    folder = tmp_path_factory.mktemp("written") / "student"
    return student, save_student(folder, student, base)


@pytest.fixture
def copy(written, tmp_path):
    """A checkpoint that may be damaged."""
    return shutil.copytree(written[1], tmp_path / "copy")


@contextmanager
def files_of_at_most(num_bytes):
    """Let the kernel refuse to write larger files: a full disk, as every library meets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("family", "tied"), FAMILY_TIED)
def test_a_student_comes_back_to_the_bit(base, tmp_path, family, tied):
    """Same logits, same parts, same header; a tied head is stored once and tied again."""
    student = tiny_student(family, tied=tied)
    save_student(tmp_path / "s", student, base, metrics={"kl_nats": 0.5}, cache_fingerprint="f")
    found, header = read_checkpoint(tmp_path / "s")
    assert torch.equal(found(TOKEN_IDS).logits, student(TOKEN_IDS).logits)
    assert header.metrics == {"kl_nats": 0.5}
    assert header == read_header(tmp_path / "s")
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "s" / "student.safetensors")) != tied
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert not found.training


@pytest.mark.recipe
@pytest.mark.parametrize("plan", ["q3a5_g16", "q4_r4", "q2a4_int_g32", "q2_g0"])
def test_every_kind_of_scale_and_width_comes_back(base, tmp_path, plan):
    """Odd bits, low rank, fixed codebooks, whole rows: every weight to the bit, biases too."""
    student = tiny_student(plan=plan, attention_bias=True)
    save_student(tmp_path / "s", student, base, plan=plan)
    found, _ = read_checkpoint(tmp_path / "s")
    layers = quantized_layers(found)
    for name, layer in quantized_layers(student).items():
        assert torch.equal(layer.fake_quantized_weight(), layers[name].fake_quantized_weight())
        assert torch.equal(layer.indices, layers[name].indices)
        assert (layer.bias is None) == (layers[name].bias is None)
    assert torch.equal(found(TOKEN_IDS).logits, student(TOKEN_IDS).logits)


def test_a_student_in_training_is_written_as_it_is_used(base, tmp_path):
    """Latent weights that moved, codebook values out of order, norms off the bfloat16 grid."""
    student = tiny_student()
    for layer in quantized_layers(student).values():
        thaw_indices(layer)
        layer.latent_weight.data += 0.05 * torch.randn_like(layer.latent_weight)
        layer.codebook.data += 0.1 * torch.randn_like(layer.codebook)
    student.model.norm.weight.data += 1e-3 * torch.randn(64)
    save_student(tmp_path / "s", student, base)
    found, _ = read_checkpoint(tmp_path / "s")
    assert torch.equal(found(TOKEN_IDS).logits, student(TOKEN_IDS).logits)
    assert torch.equal(found.model.norm.weight, student.model.norm.weight)


def test_writing_twice_gives_the_same_bytes(written, base, tmp_path):
    """So that a fingerprint of a file means its content."""
    student, folder = written
    again = save_student(tmp_path / "again", student, base)
    for name in ("student.safetensors", "checkpoint.json"):
        assert sha256_of_file(folder / name) == sha256_of_file(again / name)


def test_the_folder_needs_nothing_else(written):
    """Config, tokenizer and template travel along; the header comes with versions and sha256."""
    names = {path.name for path in written[1].iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    header = read_header(written[1])
    assert header.sha256 == sha256_of_file(written[1] / "student.safetensors")
    assert set(header.versions) == {"qat", "torch", "transformers"}
    assert is_checkpoint(written[1])


def test_dense_parts_are_stored_in_the_smallest_dtype_that_loses_nothing():
    """bfloat16, else float16, else float32; never rounded."""
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.randn(50).to(dtype).float()
        assert smallest_lossless(values).dtype == dtype
        assert torch.equal(smallest_lossless(values).float(), values)
    assert smallest_lossless(torch.tensor([1 / 3])).dtype == torch.float32
    assert smallest_lossless(torch.ones(3, dtype=torch.int64)).dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_parts_load_in_the_dtype_asked_for(written, dtype):
    """Scales and codebooks stay float32: they are what trains."""
    found, _ = read_checkpoint(written[1], dtype=dtype)
    assert found.model.norm.weight.dtype == dtype
    assert all(p.dtype == torch.float32 for p in quantized_layers(found).popitem()[1].parameters())


def test_bits_per_weight_count_everything_that_ships(written):
    """By hand: 2-bit MLP, 4-bit attention, 16 bits for 32 weights' scale and a codebook value."""
    student, _ = written
    mlp = 2 * 3 * (64 * 128 * 2 + 64 * 128 // 32 * 16 + 4 * 16)
    attention = 2 * (2 * 64 * 64 + 2 * 64 * 32)
    attention_bits = attention * 4 + attention // 32 * 16 + 2 * 4 * 16 * 16
    dense = dense_tensors(student).values()
    dense_bits = sum(tensor.numel() * tensor.element_size() * 8 for tensor in dense)
    dense_count = sum(tensor.numel() for tensor in dense)
    count = 2 * 3 * 64 * 128
    found = bits_per_weight(student)
    assert found["bits_per_weight_mlp"] == pytest.approx(mlp / count, abs=1e-4)
    expected = (mlp + attention_bits) / (count + attention)
    assert found["bits_per_weight"] == pytest.approx(expected, abs=1e-4)
    expected = (mlp + attention_bits + dense_bits) / (count + attention + dense_count)
    assert found["bits_per_weight_model"] == pytest.approx(expected, abs=1e-4)


def test_bits_per_weight_are_those_of_the_file(written):
    """What is counted is what lies on disk, but for the file's own header of names."""
    student, folder = written
    tensors = load_file(folder / "student.safetensors")
    stored = sum(tensor.numel() * tensor.element_size() * 8 for tensor in tensors.values())
    weights = sum(tensor.numel() for tensor in dense_tensors(student).values())
    weights += sum(layer.indices.numel() for layer in quantized_layers(student).values())
    counted = bits_per_weight(student)["bits_per_weight_model"]
    assert counted == pytest.approx(stored / weights, rel=1e-3)


def test_a_dense_model_has_no_bits_per_quantized_weight():
    """None, not a division by zero."""
    found = bits_per_weight(tiny_llama())
    assert found["bits_per_weight"] is None
    assert found["bits_per_weight_mlp"] is None
    assert found["bits_per_weight_model"] > 0


def rewrite(folder, change):
    """Change the tensors of a checkpoint and make its sha256 fit again."""
    tensors = load_file(folder / "student.safetensors")
    change(tensors)
    save_file(tensors, folder / "student.safetensors")
    change_header(folder, sha256=sha256_of_file(folder / "student.safetensors"))


def change_header(folder, **values):
    path = folder / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.scale"), rf"{LAYER}.scale is missing"),
        (lambda t: t.pop("model.norm.weight"), r"model.norm.weight is missing"),
        (lambda t: t.update(extra=torch.ones(1)), r"unknown tensor extra.*fits another model"),
        (
            lambda t: t.update({f"{LAYER}.scale": torch.ones(2, 2)}),
            rf"{LAYER}.scale has shape \(2, 2\), the model has \(128, 2\)",
        ),
        (
            lambda t: t.update({f"{LAYER}.indices": torch.ones(7, dtype=torch.uint8)}),
            r"7 bytes do not hold 8192 indices of 2 bits",
        ),
    ],
)
def test_a_file_of_another_model_names_the_tensor(copy, change, message):
    """Missing, left over or of another shape: never a student that is half something else."""
    rewrite(copy, change)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(copy)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", TINY_MODELS)
def test_quantized_embeddings_and_offsets_come_back(base, tmp_path, family, tied):
    """To the bit; a tied head is no entry of the file and is tied again."""
    plan = "all=affine4-g64, mlp=gguf:q4_1" if family == "qwen3" else "q2a4, embed=int4-g32"
    student = tiny_student(family, plan, tied=tied)
    save_student(tmp_path / "s", student, base, plan=plan)
    found, header = read_checkpoint(tmp_path / "s")
    assert torch.equal(found(TOKEN_IDS).logits, student(TOKEN_IDS).logits)
    assert list(quantized_layers(found)) == list(quantized_layers(student))
    assert header.plan == plan_of(student, plan).to_dict()
    stored = load_file(tmp_path / "s" / "student.safetensors")
    assert any(name.startswith("lm_head") for name in stored) != tied


def test_a_changed_byte_is_seen(copy):
    """By the sha256 in the header, before anything is loaded."""
    path = copy / "student.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="does not match its sha256; fetch or make it again"):
        read_checkpoint(copy)


def test_a_header_of_another_plan_does_not_fit(copy):
    """Bits that are not those of the file."""
    change_header(copy, plan=plan_of(tiny_llama(), "q4a4").to_dict())
    with pytest.raises(ValueError, match="do not hold"):
        read_checkpoint(copy)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"format": "qat-student-9"}', '{"format": "qat-student-1"}', "3", "{broken"],
)
def test_a_header_that_is_none_is_refused(copy, content):
    """By name, with the remedy; it used to end in a traceback."""
    (copy / "checkpoint.json").write_text(content)
    with pytest.raises(ValueError, match=r"checkpoint\.json (has format|is not JSON).*again"):
        read_header(copy)


def test_a_header_with_a_field_of_the_future_is_refused(copy):
    """Rather than ignored: it may change what the numbers mean."""
    change_header(copy, rotation="hadamard")
    with pytest.raises(ValueError, match=r"checkpoint\.json: rotation is no field.*again"):
        read_header(copy)


def old_scheme(**changes):
    """Return the scheme q2a4 as version 0.1.0 wrote it."""
    layer = {
        "bits": 4,
        "group_size": 32,
        "rank": 0,
        "codebook": "learned",
        "stored_dtype": "float16",
        "scale_floor": None,
    }
    return {"name": "q2a4", "mlp": {**layer, "bits": 2}, "attention": layer, **changes}


def make_old(folder, scheme):
    """Give a folder the header that version 0.1.0 wrote: a scheme in the place of the plan."""
    values = json.loads((folder / "checkpoint.json").read_text())
    del values["plan"]
    (folder / "checkpoint.json").write_text(
        json.dumps({**values, "format": "qat-student-1", "scheme": scheme})
    )


def test_a_student_of_0_1_0_opens(written, copy):
    """Its scheme of MLP and attention layers stands for the same formats, to the bit."""
    make_old(copy, old_scheme())
    found, header = read_checkpoint(copy)
    assert torch.equal(found(TOKEN_IDS).logits, written[0](TOKEN_IDS).logits)
    assert header.plan["name"] == "q2a4"
    specs = {name: layer.spec for name, layer in quantized_layers(found).items()}
    assert specs == plan_of(tiny_llama()).quantized
    assert make_spec(2) in specs.values()


@pytest.mark.parametrize("change", [{"mlp": {"wbits": 2}}, {"mlp": None}, {"attention": {}}])
def test_a_scheme_that_cannot_be_read_is_refused(copy, change):
    """In one line that says so, not as a missing argument."""
    make_old(copy, old_scheme(**change))
    with pytest.raises(ValueError, match="make the checkpoint again"):
        read_checkpoint(copy)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"tensors": {}}, "has no name; make the checkpoint"),
        ({"name": "x"}, "lists no tensors"),
        ({"name": "x", "tensors": {"a": 1}}, "lists no tensors"),
        ({"name": "x", "tensors": {"a": "f32"}}, "is of another model: .* is in the"),
        (3, "plan: Expected `object`"),
    ],
)
def test_a_plan_that_cannot_be_read_is_refused(copy, plan, message):
    """Naming the plan and what it lacks."""
    change_header(copy, plan=plan)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(copy)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("checkpoint.json", "is no student, it holds no checkpoint.json"),
        ("student.safetensors", "student.safetensors is missing; make the checkpoint again"),
        ("config.json", "config.json cannot be read"),
    ],
)
def test_a_missing_file_is_named(copy, name, message):
    """With the remedy."""
    (copy / name).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_checkpoint(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_scale_that_no_file_can_hold_names_its_layer(written, base, tmp_path, value):
    """A run that went wrong does not replace a student that did not."""
    student, folder = written
    shutil.copytree(folder, tmp_path / "s")
    layer = quantized_layers(student)[LAYER]
    previous = layer.scale.data.clone()
    layer.scale.data[0, 0] = value
    with pytest.raises(ValueError, match=rf"{LAYER}.scale holds NaN or values beyond float16"):
        save_student(tmp_path / "s", student, base)
    layer.scale.data = previous
    read_checkpoint(tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_full_disk_leaves_the_previous_student(written, base, tmp_path, limit):
    """Whichever file no longer fits: the folder is the previous one, nothing lies next to it."""
    student, _ = written
    folder = save_student(tmp_path / "s", student, base, metrics={"kl_nats": 1.0})
    header = replace(read_header(folder), metrics={"kl_nats": 0.5})
    with files_of_at_most(limit), pytest.raises((SafetensorError, OSError)):
        write_checkpoint(student, header, folder, text_source=base)
    found, header = read_checkpoint(folder)
    assert header.metrics == {"kl_nats": 1.0}
    assert torch.equal(found(TOKEN_IDS).logits, student(TOKEN_IDS).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_previous_folder_goes_whole(written, base, tmp_path):
    """Files of a previous student do not linger in the new one."""
    folder = save_student(tmp_path / "s", written[0], base)
    (folder / "notes.txt").write_text("old")
    save_student(folder, written[0], base)
    assert not (folder / "notes.txt").exists()


def test_loading_neither_depends_on_luck_nor_uses_any(written):
    """Weights are not drawn first: random numbers go on as if nothing had been loaded."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    read_checkpoint(written[1])
    assert torch.equal(torch.rand(1), expected)


def test_a_header_comes_back_from_its_file(base, tmp_path, written):
    """Every field, as JSON gives it back."""
    header = CheckpointHeader(
        plan=plan_of(written[0]).to_dict(),
        base_model={"path": "x", "name": "y", "weights": "z"},
        cache_fingerprint="abc",
        made_by={"command": "train", "settings": {"parts": ["weights"]}},
        metrics={"kl_nats": None},
    )
    as_written = write_checkpoint(written[0], header, tmp_path / "s", text_source=base)
    assert read_header(tmp_path / "s") == as_written


@pytest.mark.parametrize("plan", ["linears=gguf:i2_s", "all=mlx:4bit-g64", "all=mlx:3bit-g32"])
def test_scales_that_training_computes_with_come_back(tmp_path, plan):
    """One scale a tensor, and those that float16 computes with exactly, moved by training."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    student = tiny_student("llama", plan, **sizes)
    for layer in quantized_layers(student).values():
        layer.scale.data *= 1 + 0.01 * torch.randn_like(layer.scale)
    base = save_tiny(tmp_path / "base", tiny_llama(**sizes))
    folder = save_student(tmp_path / "student", student, base, plan)
    loaded, _ = read_checkpoint(folder)
    for name, layer in quantized_layers(loaded).items():
        trained = student.get_submodule(name).fake_quantized_weight()
        assert torch.equal(layer.fake_quantized_weight(), trained), name


@pytest.mark.parametrize(
    "change", [lambda packed: packed.double(), lambda packed: packed.view(1, -1)]
)
def test_indices_that_are_no_bytes_are_refused(copy, change):
    """Floats in their place ended in numpy's words."""
    tensors = load_file(copy / "student.safetensors")
    name = next(name for name in tensors if name.endswith(".indices"))
    save_file(tensors | {name: change(tensors[name])}, copy / "student.safetensors")
    change_header(copy, sha256=sha256_of_file(copy / "student.safetensors"))
    with pytest.raises(ValueError, match=r"student\.safetensors: .*indices is no row of bytes"):
        read_checkpoint(copy)
