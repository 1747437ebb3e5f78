"""One command from a model and a text to the best file of a size."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from qat.evaluate.config import EvaluateConfig
from qat.export.from_gguf import read_gguf_model
from qat.pipelines import compress_stages
from qat.pipelines.compress import compress
from qat.pipelines.compress_config import CompressConfig, parse_size
from qat.pipelines.compress_stages import Clock, trained_formats
from qat.pipelines.evaluate import evaluate
from qat.quant.allocate import Allocation, Choice
from qat.storage.files import folder_lock, read_json, sha256_of_file, write_json
from tests.tiny import save_tiny, tiny_llama, tiny_records, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, a text, and the files made of them in this module."""
    place = tmp_path_factory.mktemp("compress")
    save_tiny(place / "model", tiny_llama())
    write_jsonl(place / "data.jsonl", tiny_records(200))
    held_out = " ".join(f"{r['instruction']} {r['output']}" for r in tiny_records(60, seed=9))
    (place / "heldout.txt").write_text(held_out)
    return place


def config_of(folder, name="a.gguf", **changes):
    """Return settings that take seconds."""
    settings = {"size": "70KB", "minutes": 0, "num_sequences": 96, "seq_len": 32, "dtype": "fp32"}
    return CompressConfig(
        model=str(folder / "model"),
        data=str(folder / "data.jsonl"),
        output=folder / name,
        work=folder / "work" / changes.get("to", "gguf"),
        device="cpu",
        **{**settings, **changes},
    )


@pytest.fixture(scope="module")
def made(folder):
    """The result of one call."""
    return compress(config_of(folder))


@pytest.mark.recipe
def test_a_work_folder_is_of_one_call_at_a_time(folder, tmp_path):
    """The second is told who holds it, before any stage."""
    config = replace(config_of(folder), work=tmp_path / "work")
    refusal = pytest.raises(ValueError, match=r"work is in use by process \d+ on \S+ since")
    with folder_lock(tmp_path / "work"), refusal:
        compress(config)


@pytest.mark.recipe
def test_the_file_keeps_to_its_size_and_is_measured_as_it_is(folder, made):
    """Bytes are those on disk; the KL is that of the file's own weights on the same text."""
    path = Path(made.path)
    assert path.stat().st_size == made.file_bytes
    assert 0.97 * 70_000 < made.file_bytes <= 70_000
    grams = load_file(folder / "work" / "gguf" / "grams.safetensors")
    assert 0 < len(grams) <= sum("proj" in name for name in made.plan)
    assert all(torch.linalg.eigvalsh(g).min() > -1e-5 * g.diagonal().max() for g in grams.values())
    student = next((folder / "work" / "gguf" / "students").iterdir())
    cache = next((folder / "work" / "gguf" / "cache").iterdir())
    config = EvaluateConfig(
        checkpoint=str(student), cache_dir=cache, num_sequences=64, dtype="fp32", device="cpu"
    )
    assert evaluate(config).kl_nats == pytest.approx(made.kl_nats, rel=1e-4)
    assert made.kl_nats_fit == pytest.approx(made.kl_nats, rel=1e-4)
    assert made.plan["model.norm.weight"] == "f32"
    assert read_gguf_model(path, folder / "model") is not None


@pytest.mark.recipe
def test_a_whole_file_is_found_and_a_lost_one_made_again(folder, made):
    """The same call gives the same result; a killed run leaves the same bytes."""
    before = sha256_of_file(Path(made.path))
    assert compress(config_of(folder)) == made
    Path(made.path).unlink()
    shutil.rmtree(folder / "work" / "gguf" / "students")  # as if it had been killed before the fit
    again = compress(config_of(folder))
    assert sha256_of_file(Path(again.path)) == before
    assert replace(again, seconds=0, peak_rss_bytes=0) == replace(made, seconds=0, peak_rss_bytes=0)


@pytest.mark.recipe
def test_more_bytes_are_closer(folder, made):
    """A larger file of the same model has a smaller predicted and measured KL."""
    larger = compress(config_of(folder, "b.gguf", size="110KB"))
    assert larger.kl_nats_predicted < made.kl_nats_predicted
    assert larger.kl_nats < made.kl_nats


@pytest.mark.recipe
def test_minutes_are_spent_on_training(folder, monkeypatch):
    """Training lowers the validation KL, and the better student is what is exported."""
    monkeypatch.setattr(compress_stages, "rehearse_training", lambda _settings: 5.0)
    text = folder / "heldout.txt"
    config = config_of(folder, "c.gguf", size="44KB", minutes=10, lr=0.05, eval_text=text)
    result = compress(config)
    (file,) = (folder / "work" / "gguf" / "steps").iterdir()
    assert read_json(file)["value"] > 10
    assert result.kl_nats_validation < result.kl_nats_fit
    assert result.measured_on == "heldout.txt"
    assert result.perplexity_teacher > 1


@pytest.mark.recipe
def test_time_that_is_up_loses_no_training(folder, monkeypatch):
    """Exported anew after the minutes have passed: the trained student, not the fit."""
    monkeypatch.setattr(compress_stages, "rehearse_training", lambda _settings: 5.0)
    config = config_of(folder, "late.gguf", size="44KB", minutes=10, lr=0.05)
    before = compress(config)
    Path(before.path).unlink()
    clock = folder / "work" / "gguf" / "clocks" / "late.gguf.json"
    write_json(clock, {**read_json(clock), "seconds": 3600.0})
    again = compress(config)
    assert again.kl_nats_validation == before.kl_nats_validation < before.kl_nats_fit
    with pytest.raises(ValueError, match="late.gguf was made with other settings"):
        compress(replace(config, eval_sequences=32))


@pytest.mark.recipe
def test_bfloat16_computes_as_well(folder):
    """Norms and embedding are stored in float32: what they give has the compute dtype."""
    config = config_of(folder, "bf16.gguf", dtype="bf16", size="52KB", minutes=0.2)
    made = compress(replace(config, work=folder / "work" / "bf16"))
    assert 0 < made.kl_nats_validation <= made.kl_nats_fit


@pytest.mark.recipe
def test_a_limit_on_the_kl_gives_a_file_within_it(folder, made):
    """--kl makes a file whose validation KL is at most the number."""
    limit = made.kl_nats * 1.5
    result = compress(config_of(folder, "d.gguf", size=None, kl=limit))
    assert result.kl_nats_fit <= limit
    assert result.file_bytes < made.file_bytes * 1.3


@pytest.mark.recipe
@pytest.mark.parametrize("target", ["mlx", "compressed-tensors", "hf-quantized"])
def test_other_targets_keep_to_their_size(folder, target):
    """Everything in the folder counts."""
    size = {"mlx": "90KB", "compressed-tensors": "130KB", "hf-quantized": "90KB"}[target]
    result = compress(config_of(folder, f"e-{target}", to=target, size=size))
    files = [path for path in Path(result.path).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) == result.file_bytes <= parse_size(size)


@pytest.mark.recipe
def test_stages_of_another_file_count_for_each_once(tmp_path):
    """What a shared stage took the first file is taken off the time of the second, also resumed."""
    first = Clock(tmp_path / "a.json", 1.0)
    assert first.shared_stage("costs", lambda: time.sleep(0.2) or 7) == 7
    first.note()
    for _ in range(2):  # the second time as a process that continues
        second = Clock(tmp_path / "b.json", 1.0)
        assert second.shared_stage("costs", lambda: 7) == 7
        assert 0.2 <= second.seconds < 0.35
        assert second.left == pytest.approx(60 - second.seconds, abs=0.1)
        second.note()


@pytest.mark.parametrize(
    ("costs", "kind", "expected"),
    [
        ((0.7, 0.3, 0.0), "cpu", ["gguf:q2_0"]),
        ((0.5, 0.5, 0.0), "cpu", ["gguf:q2_0", "gguf:q4_0"]),
        ((0.0, 0.0, 0.0), "cpu", ["gguf:q2_0"]),
        ((0.7, 0.3, 8.0), "cpu", ["gguf:q2_0"]),
        ((0.7, 0.3, 8.0), "cuda", ["gguf:iq2_s", "gguf:q2_0"]),
    ],
)
def test_formats_that_hold_most_of_the_kl_train(costs, kind, expected):
    """The fewest bits whose tensors are predicted to lose the most, where a device trains them."""
    source = SimpleNamespace(place=SimpleNamespace(device=SimpleNamespace(kind=kind)))
    names = ("gguf:q2_0", "gguf:q4_0", "gguf:iq2_s", "f32")
    found = {name: Choice(name, 1, cost) for name, cost in zip(names, (*costs, 9.0), strict=True)}
    assert list(trained_formats(Allocation(found), source)) == expected
    assert trained_formats(Allocation({"f32": found["f32"]}), source) == ()


def test_bad_input_is_refused_before_any_work(folder):
    """A size below the smallest plan names it; flags that exclude each other are named."""
    with pytest.raises(ValueError, match=r"below the smallest gguf file of this model: [\d,]+"):
        compress(config_of(folder, "f.gguf", size="20KB"))
    assert not (folder / "work" / "gguf" / "clocks" / "f.gguf.json").exists()
    with pytest.raises(ValueError, match="--size and --kl given"):
        config_of(folder, kl=0.1)
    with pytest.raises(ValueError, match="no size given"):
        config_of(folder, size=None)
    with pytest.raises(ValueError, match="size '12 parsecs' is none"):
        config_of(folder, size="12 parsecs")
    (folder / "g.gguf").write_bytes(b"x")
    with pytest.raises(ValueError, match="exists; remove it"):
        compress(config_of(folder, "g.gguf"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("60MB", 60_000_000), ("1.5 MiB", 1_572_864), ("123", 123), ("2gb", 2 * 10**9)],
)
def test_sizes_are_read_with_their_units(text, expected):
    """MB is 10**6 bytes, MiB 2**20."""
    assert parse_size(text) == expected
