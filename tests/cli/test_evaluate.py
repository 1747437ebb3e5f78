import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat.storage.files import read_json, sha256_of_file, write_json
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.recipe

KEYS = {
    "kl_nats",
    "kl_nats_lower",
    "kl_stderr",
    "kl_median",
    "kl_p90",
    "kl_p95",
    "kl_p99",
    "kl_p999",
    "kl_max",
    "kd_loss",
    "perplexity",
    "perplexity_stderr",
    "top1_agreement",
    "tokens",
    "bits_per_weight",
    "bits_per_weight_mlp",
    "bits_per_weight_model",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text file of a few hundred tokens."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the cat sees a red boat and two small birds near the old mill " * 8)
    return file


def test_the_closing_line_has_every_number(run, path):
    """On a cache: those that made the student, to the last digit that matters.

    A cache of some tokens gives a lower bound of the KL, and not under the exact number's name.
    """
    found = run("evaluate", checkpoint=path.q2, cache_dir=path.cache).closing
    assert found.keys() >= KEYS
    made = path.closing["q2"]
    for name in KEYS:
        assert found[name] == (made[name] and pytest.approx(made[name], rel=1e-6)), name


def test_the_teacher_can_be_measured_as_well(run, path):
    """Next to no distance; it has no quantized weights, so their bits are null."""
    found = run("evaluate", checkpoint=path.teacher, cache_dir=path.cache).closing
    assert abs(found["kl_nats_lower"]) < 1e-3
    assert found["bits_per_weight"] is None
    assert found["bits_per_weight_mlp"] is None
    assert found["bits_per_weight_model"] > 0


def test_a_live_teacher_makes_the_distance_exact(run, path, tmp_path):
    """kl_nats over the whole vocabulary, above the bound; another teacher is pointed out."""
    flags = {"checkpoint": path.q2, "cache_dir": path.cache}
    bound = run("evaluate", **flags).closing
    done = run("evaluate", teacher=path.teacher, **flags)
    assert bound["kl_nats"] is None is done.closing["kl_nats_lower"]
    assert done.closing["kl_nats"] > bound["kl_nats_lower"] > 0
    assert done.closing["kd_loss"] == bound["kd_loss"]
    assert "--teacher is not the cache's" not in done.said
    save_tiny(tmp_path / "m", tiny_llama(seed=5))
    other = run("evaluate", teacher=tmp_path / "m", **flags)
    assert "--teacher is not the cache's" in other.said
    assert other.closing["kl_nats"] > done.closing["kl_nats"]


def test_any_text_will_do(run, path, text):
    """KL over the full vocabulary against a live teacher; without one, perplexity alone."""
    flags = {"checkpoint": path.q2, "text": text, "seq_len": 16}
    found = run("evaluate", teacher=path.teacher, **flags).closing
    assert found.keys() >= KEYS
    assert found["kl_nats"] > 0
    alone = run("evaluate", **flags).closing
    assert alone["perplexity"] == pytest.approx(found["perplexity"])
    assert [alone[name] for name in ("kl_nats", "kl_p99", "kd_loss", "top1_agreement")] == [
        None
    ] * 4
    same = run("evaluate", **{**flags, "checkpoint": path.teacher}, teacher=path.teacher).closing
    assert abs(same["kl_nats"]) < 1e-6
    assert same["top1_agreement"] == 1.0


def test_fewer_sequences_count_fewer_tokens(run, path, text):
    """--num-sequences limits a cache as it limits a text."""
    for flags, length in (({"cache_dir": path.cache}, 15), ({"text": text, "seq_len": 16}, 16)):
        found = run("evaluate", checkpoint=path.q2, num_sequences=2, **flags).closing
        assert found["tokens"] == 2 * length


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "give one of --cache-dir, --text, --perplexity and --tasks"),
        ({"cache_dir": "no/such/cache"}, "cache no/such/cache does not exist"),
        ({"checkpoint": "no/such/student", "text": "x"}, "no folder no/such/student"),
        ({"text": "no/such/text"}, "no/such/text: No such file or directory; check the path"),
        ({"text": "x", "seq_len": 1}, "--seq-len 1 must be 2 or more"),
        ({"text": "x", "num_sequences": 0}, "--num-sequences 0 must be 1 or more"),
        ({"text": "x", "teacher": "no/such/model"}, "no folder no/such/model"),
        ({"cache_dir": "x", "device": "warp"}, "--device warp is not one of"),
    ],
)
def test_bad_input_is_one_line(refused, path, flags, message):
    """What, and what to do."""
    assert message in refused("evaluate", **{"checkpoint": path.q2, **flags})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 tokens, less than one block of 16"),
        (b"short", "has 5 tokens, less than one block of 16"),
        (b"\xff\xfe\x00" * 40, "is not UTF-8 text"),
    ],
)
def test_a_text_that_cannot_be_measured_on_says_why(refused, path, tmp_path, content, message):
    """Empty, shorter than a block, no text at all."""
    (tmp_path / "text").write_bytes(content)
    flags = {"checkpoint": path.q2, "text": tmp_path / "text", "seq_len": 16}
    assert message in refused("evaluate", **flags)


def test_a_cache_of_other_words_is_refused(refused, path, tmp_path):
    """Another tokenizer, or a vocabulary of another width."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|another|>"])
    save_tiny(tmp_path / "words", tiny_llama(), tokenizer)
    save_tiny(tmp_path / "width", tiny_llama(vocab_size=300))
    message = refused("evaluate", checkpoint=tmp_path / "words", cache_dir=path.cache)
    assert "the cache has tokenizer_sha256 " in message
    message = refused("evaluate", checkpoint=tmp_path / "width", cache_dir=path.cache)
    assert "the cache has vocab_size 272, here it is 300" in message


def test_a_teacher_of_another_width_is_refused(refused, path, text, tmp_path):
    """Two vocabularies have no distance."""
    save_tiny(tmp_path / "m", tiny_llama(vocab_size=300))
    for data in ({"text": text, "seq_len": 16}, {"cache_dir": path.cache}):
        message = refused("evaluate", checkpoint=path.q2, teacher=tmp_path / "m", **data)
        assert "--teacher has a vocabulary of 300, the student of 272" in message


def damage_header(folder):
    (folder / "checkpoint.json").write_text("[]")


def damage_plan(folder):
    values = read_json(folder / "checkpoint.json")
    tensors = values["plan"]["tensors"]
    tensors |= {name: "lut4-g32" for name in tensors if ".mlp." in name}
    write_json(folder / "checkpoint.json", values)


def damage_size(folder):
    values = read_json(folder / "config.json")
    write_json(folder / "config.json", {**values, "hidden_size": 32, "head_dim": 8})


def damage_tensor(folder):
    tensors = load_file(folder / "student.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "student.safetensors")
    values = read_json(folder / "checkpoint.json")
    values["sha256"] = sha256_of_file(folder / "student.safetensors")
    write_json(folder / "checkpoint.json", values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_header, "checkpoint.json has format None"),
        (damage_plan, "do not hold 8192 indices of 4 bits"),
        (damage_size, "do not hold"),
        (damage_tensor, "model.norm.weight is missing"),
        (lambda f: (f / "student.safetensors").write_bytes(b"x"), "does not match its sha256"),
        (lambda f: (f / "student.safetensors").unlink(), "student.safetensors is missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer in"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(refused, path, tmp_path, damage, message):
    """A plan that is not the file's, a model of other sizes, a damaged or missing file."""
    folder = shutil.copytree(path.q2, tmp_path / "damaged")
    damage(folder)
    assert message in refused("evaluate", checkpoint=folder, cache_dir=path.cache)


def test_an_altered_cache_is_refused(refused, path, tmp_path):
    """A shard of another size, or a manifest that says something else than its fingerprint."""
    for name in ("shard", "manifest"):
        folder = shutil.copytree(path.cache, tmp_path / name)
        if name == "shard":
            shard = next(folder.glob("*.safetensors"))
            shard.write_bytes(shard.read_bytes()[:-1])
        else:
            values = read_json(folder / "manifest.json")
            values["identity"]["seq_len"] = 17
            write_json(folder / "manifest.json", values)
        message = refused("evaluate", checkpoint=path.q2, cache_dir=folder)
        assert str(folder) in message


def test_low_precision_is_near(run, path):
    """bfloat16 measures the same student, to its precision."""
    exact = run("evaluate", checkpoint=path.q2, cache_dir=path.cache).closing
    flags = {"dtype": "bf16", "device": "cpu"}
    near = run("evaluate", checkpoint=path.q2, cache_dir=path.cache, **flags).closing
    assert near["perplexity"] == pytest.approx(exact["perplexity"], rel=0.1)
    assert near["bits_per_weight"] == exact["bits_per_weight"]
    assert torch.isfinite(torch.tensor(near["kl_nats_lower"]))
