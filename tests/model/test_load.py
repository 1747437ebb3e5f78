import json
import shutil
import time

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from qat.model import load
from qat.model.load import (
    base_weights,
    load_dense,
    load_tokenizer,
    model_folder,
    model_identity,
    vocabulary_size,
)
from qat.pipelines.open_checkpoint import checkpoint_path, load_model
from qat.storage.files import previous_folder
from tests.tiny import (
    TINY_MODELS,
    save_student,
    save_tiny,
    tiny_llama,
    tiny_student,
    tiny_tokenizer,
)

TOKEN_IDS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder that no test changes."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", tiny_llama())


@pytest.fixture(scope="module")
def student(model, tmp_path_factory):
    """A student folder that no test changes."""
    return save_student(tmp_path_factory.mktemp("students") / "q2", tiny_student(), model)


@pytest.fixture
def copy(model, tmp_path):
    """A model folder that may be damaged."""
    return shutil.copytree(model, tmp_path / "copy")


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    """A machine that has fetched `org/tiny` from the hub before, and has no network now."""
    revision = "0123456789" * 4
    stored = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(model, stored / "snapshots" / revision)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    load.hub_snapshot.cache_clear()
    yield stored / "snapshots" / revision
    load.hub_snapshot.cache_clear()


def test_a_hub_name_means_its_files(hub, model):
    """Tokenizer, weights, vocabulary and identity are those of a folder with the same files."""
    assert model_folder("org/tiny").resolve() == hub.resolve()
    assert model_identity("org/tiny")["weights"] == model_identity(model)["weights"]
    assert model_identity("org/tiny")["name"] == "org/tiny"
    assert model_identity("hf:org/tiny")["revision"] == hub.name
    assert model_folder(f"org/tiny@{hub.name}").resolve() == hub.resolve()
    assert load_tokenizer("org/tiny").get_vocab() == tiny_tokenizer().get_vocab()
    assert vocabulary_size("org/tiny") == 272
    assert torch.equal(load_dense("org/tiny")(TOKEN_IDS).logits, tiny_llama()(TOKEN_IDS).logits)
    assert load_model("org/tiny")[1] is None


@pytest.mark.parametrize(
    "name", ["no/such/folder", "/no/such/folder", "./none", "../none", "runs/none/", "a b", "~"]
)
@pytest.mark.parametrize("read", [load_dense, load_tokenizer, load_model, model_identity])
def test_what_is_no_hub_name_is_not_sought_there(monkeypatch, name, read):
    """A mistyped path took 25 seconds of retries; now no library is asked at all."""
    monkeypatch.setattr(load, "hub_snapshot", lambda name: pytest.fail(f"asked for {name}"))
    with pytest.raises(FileNotFoundError, match="no folder .*; give a folder of a model"):
        read(name)


def test_a_hub_name_that_is_not_here_fails_at_once(hub):
    """Offline there is nothing to wait for; the message says what was tried and what to give."""
    started = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=r"no folder org/none, and the model hub does not"):
        load_dense("org/none")
    assert time.perf_counter() - started < 3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", TINY_MODELS)
def test_a_folder_gives_its_model(tmp_path, family, tied):
    """Frozen, in eval mode, in the dtype asked for."""
    expected = TINY_MODELS[family](tied=tied)
    save_tiny(tmp_path / "m", expected)
    found = load_dense(tmp_path / "m")
    assert torch.equal(found(TOKEN_IDS).logits, expected(TOKEN_IDS).logits)
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert load_dense(tmp_path / "m", dtype=torch.bfloat16).dtype == torch.bfloat16


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "1 weights do not fit.*up_proj"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            "1 weights do not fit config.json, model.norm.weight the first; fetch the model again",
        ),
    ],
)
def test_a_model_is_never_filled_up_with_random_weights(copy, change, message, capfd):
    """Missing or misfitting weights were drawn at random, with a table of warnings only."""
    change_weights(copy, change)
    with pytest.raises(ValueError, match=message):
        load_dense(copy)
    assert "MISSING" not in capfd.readouterr().err


def test_a_damaged_weight_file_is_named(copy):
    """safetensors' own error names neither file nor remedy."""
    (copy / "model.safetensors").write_bytes(b"xx")
    with pytest.raises(ValueError, match="copy cannot be read .*; fetch or make"):
        load_dense(copy)


@pytest.mark.parametrize(
    ("name", "read", "message"),
    [
        ("model.safetensors", load_dense, "no weights in"),
        ("model.safetensors", model_identity, "no weights in"),
        ("config.json", load_dense, "holds no config.json"),
        ("config.json", vocabulary_size, "config.json cannot be read"),
    ],
)
def test_what_is_missing_is_named(copy, name, read, message):
    """With the remedy."""
    (copy / name).unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        read(copy)


def test_a_folder_without_tokenizer_is_refused(copy):
    """It says what to give instead."""
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer in .*copy; give a folder"):
        load_tokenizer(copy)


def test_a_token_id_beyond_all_vocabularies_is_refused(copy):
    """Tokenizers would list two billion numbers, 9 GB, for the hash of a file of kilobytes."""
    path = copy / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"][list(values["model"]["vocab"])[-1]] = 2**31
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"tokenizer of {copy} has the token id 2,147,483,648"):
        load_tokenizer(copy)


def test_a_damaged_tokenizer_is_refused(copy):
    """In plain text, whatever the library makes of it."""
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(FileNotFoundError, match="no tokenizer in .*copy; give a folder"):
        load_tokenizer(copy)


def test_a_student_is_no_full_precision_model(student):
    """A second quantization of a student would pass for one of the model."""
    with pytest.raises(ValueError, match="is a student; give the full-precision model"):
        load_dense(student)


def test_weights_are_named_by_what_they_are(model, copy):
    """A copy has the same identity, a changed byte another one; other files do not count."""
    identity = model_identity(model)
    assert identity["name"] == "tiny"
    (copy / "README.md").write_text("text")
    assert model_identity(copy)["weights"] == identity["weights"]
    change_weights(copy, lambda t: t["model.norm.weight"].add_(1))
    assert model_identity(copy)["weights"] != identity["weights"]


def test_base_weights_are_those_that_the_student_was_made_from(model, copy):
    """By hash: of another model, or of none, there are no weights to start from."""
    identity = model_identity(model)
    weight_of = base_weights(model, identity)
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(weight_of(name), tiny_llama().get_submodule(name).weight)
    assert weight_of("model.layers.9.mlp.up_proj") is None
    change_weights(copy, lambda t: t["model.norm.weight"].add_(1))
    changed = base_weights(copy, identity)
    assert changed(name) is None
    assert changed.why_missing == f"{copy} holds other weights than the student was made from"
    missing = base_weights("no/such/folder", identity)
    assert missing(name) is None
    assert "no folder no/such/folder" in missing.why_missing


@pytest.mark.parametrize("is_zip", [True, False])
def test_base_weights_are_read_from_torch_files_as_well(model, tmp_path, is_zip):
    """A base model of .bin files passed its hash and gave no weight: layers started elsewhere."""
    folder = shutil.copytree(model, tmp_path / "bin")
    (folder / "model.safetensors").unlink()
    tensors = {name: tensor.clone() for name, tensor in tiny_llama().state_dict().items()}
    file = folder / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=is_zip)
    torch.save({"lr": 1.0}, folder / "training_args.bin")
    weight_of = base_weights(folder, model_identity(folder))
    name = "model.layers.0.mlp.up_proj"
    assert weight_of.why_missing is None
    assert torch.equal(weight_of(name), tensors[f"{name}.weight"])
    assert weight_of("model.layers.9.mlp.up_proj") is None


def test_a_run_stands_for_its_best_student(student, tmp_path):
    """best before final; a run that has only ended stands for its end."""
    run = tmp_path / "run"
    shutil.copytree(student, run / "final")
    assert checkpoint_path(run) == run / "final"
    shutil.copytree(student, run / "best")
    assert checkpoint_path(run) == run / "best"
    assert checkpoint_path(run / "final") == run / "final"
    expected, header = load_model(student)
    assert header is not None
    assert torch.equal(load_model(run)[0](TOKEN_IDS).logits, expected(TOKEN_IDS).logits)


def test_a_student_hidden_by_a_kill_is_found(student, tmp_path):
    """A process killed while it replaced `best` left the previous one under a hidden name."""
    run = tmp_path / "run"
    shutil.copytree(student, run / "best")
    (run / "best").rename(previous_folder(run / "best"))
    assert checkpoint_path(run) == run / "best"


def test_a_folder_of_neither_is_refused(tmp_path):
    """An empty folder is no checkpoint."""
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        load_model(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    """A text file is none either."""
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match="notes.txt is no checkpoint; give"):
        load_model(tmp_path / "notes.txt")


def test_the_vocabulary_is_the_width_of_the_logits(model, copy):
    """Padding included, which the tokenizer does not know of."""
    assert vocabulary_size(model) == load_dense(model)(TOKEN_IDS).logits.shape[-1]
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    assert vocabulary_size(copy) == 300


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}}, "weight_map"),
        ("adapter_config.json", {}, "is an adapter; merge it"),
    ],
)
def test_a_folder_that_names_others_is_refused(copy, name, content, said):
    """An index could name a file anywhere on the disk, whose bytes no identity covers."""
    (copy / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        load_dense(copy)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", 2**31), ("vocab_size", 0), ("hidden_size", 2**40), ("rope_theta", [1])],
)
def test_a_config_that_no_model_has_is_refused_at_once(copy, name, value):
    """Millions of layers would be made before one weight is found missing."""
    config = json.loads((copy / "config.json").read_text())
    config |= {name: value} | ({"rope_parameters": {name: value}} if "rope" in name else {})
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"copy(/config\.json)?(: | cannot be read).*again"):
        load_dense(copy)


def test_weights_that_are_not_finite_are_named(copy):
    """A teacher with a NaN gave a cache of them."""
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"copy: tensor model\.norm\.weight holds NaN.*again"):
        load_dense(copy)


def test_code_of_a_model_is_not_run(copy):
    """`auto_map` names a file of Python in the folder."""
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_dense(copy)
