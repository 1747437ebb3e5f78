from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qat
from qat.export.from_gguf import read_gguf_model
from qat.export.to_gguf import export_to_gguf
from qat.model.load import load_dense
from qat.pipelines.place import Place
from qat.pipelines.pretrain import open_run, pretrain
from qat.pipelines.train_dense import FLOAT8, held_out_numbers, run_settings
from qat.tracking.record import read_rows
from qat.train.config import IntervalsConfig, TrackingConfig
from qat.train.dense_config import DenseOptimConfig
from qat.train.pretrain_config import PretrainConfig
from tests.tiny import tiny_llama, tiny_records, tiny_shards, write_jsonl


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two steps of a tiny model, one per set of texts."""
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama().config.save_pretrained(folder / "shape")
    (folder / "birds.txt").write_text("two small birds near the old boat. " * 3)
    words = write_jsonl(folder / "words.jsonl", tiny_records(8))
    return PretrainConfig(
        data_dir=tiny_shards(folder),
        output_dir=folder / "run",
        arch=str(folder / "shape"),
        eval_sets=(f"birds={folder / 'birds.txt'},words={words}",),
        seq_len=16,
        max_steps=2,
        device="cpu",
        dtype="fp32",
        optim=DenseOptimConfig(lr=3e-3, warmup_steps=1),
        intervals=IntervalsConfig(log_steps=1, eval_samples=4),
        tracking=TrackingConfig(to="tensorboard"),
    )


@pytest.mark.recipe
def test_named_texts_have_keys_of_their_own_in_every_sink(config):
    """The record and TensorBoard's events hold the same numbers of each at the same steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(config)
    events = EventAccumulator(str(config.output_dir / "tensorboard"))
    events.Reload()
    for name in ("birds", "words"):
        key = f"eval/{name}/perplexity"
        rows = {row["step"]: row[key] for row in read_rows(config.output_dir) if key in row}
        shown = {event.step: event.value for event in events.Scalars(key)}
        assert shown == pytest.approx(rows, rel=1e-6)
        assert list(rows) == [0, 2]


@pytest.mark.recipe
def test_a_look_takes_no_step(config, tmp_path):
    """--eval-only gives the best model's recorded numbers, and those of texts named only now."""
    pretrain(config)
    before = {path: path.stat().st_mtime_ns for path in config.output_dir.rglob("*")}
    (tmp_path / "new.txt").write_text("a red boat " * 9)
    new = (*config.eval_sets, str(tmp_path / "new.txt"))
    found = pretrain(replace(config, eval_only=True, eval_sets=new))
    last = read_rows(config.output_dir)[-1]
    for name in ("perplexity", "birds/perplexity", "words/perplexity"):
        assert found.numbers[name] == pytest.approx(last[f"eval/{name}"], rel=1e-5)
    run, model = open_run(replace(config, eval_sets=new)), load_dense(found.checkpoint)
    assert held_out_numbers(run, model) == found.numbers
    assert found.numbers["new/perplexity"] > 1
    assert {path: path.stat().st_mtime_ns for path in config.output_dir.rglob("*")} == before
    with pytest.raises(ValueError, match="--eval-only: .* holds no model yet; train first"):
        pretrain(replace(config, eval_only=True, output_dir=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.recipe
def test_a_factorized_embedding_is_saved_as_one_matrix(config, tmp_path):
    """Fewer weights train than the folder holds; it and its GGUF file compute what was measured."""
    shape = tiny_llama(tied=False).config
    shape.embedding_rank = 8
    shape.save_pretrained(tmp_path / "shape")
    changes = {"arch": str(tmp_path / "shape"), "tracking": TrackingConfig(), "eval_sets": ()}
    run = replace(config, output_dir=tmp_path / "run", **changes)
    result = pretrain(run)
    model = load_dense(result.checkpoint)
    assert result.parameters < sum(parameter.numel() for parameter in model.parameters())
    found = held_out_numbers(open_run(run), model)
    assert found["perplexity"] == pytest.approx(result.best_perplexity, rel=1e-5)
    folder, file = Path(result.checkpoint), tmp_path / "model.gguf"
    export_to_gguf(model, file, text_source=folder, dtype=torch.float32)
    ids = torch.arange(32)[None]
    assert torch.equal(read_gguf_model(file, folder)(ids).logits, model(ids).logits)
    place = {"device": "cpu", "dtype": "fp32"}
    data = write_jsonl(tmp_path / "data.jsonl", tiny_records(40))
    cache = qat.build_cache(folder, data, seq_len=16, output_dir=tmp_path, **place).cache
    student = tmp_path / "student"
    qat.quantize(folder, "q2a4, embed=int4-g32", cache=cache, output=student, **place)
    trained = qat.train(student, cache, output_dir=tmp_path / "r", max_steps=12, **place)
    assert trained.best_step > 0


def test_float8_is_a_part_of_what_a_run_is(config, monkeypatch, caplog):
    """A run in it goes on in it alone; why there is none is said."""
    place = Place.of(config)
    with caplog.at_level("INFO"):
        without = run_settings(config, place)
    assert "no float8: " in caplog.text
    monkeypatch.setattr("qat.pipelines.train_dense.why_no_float8", lambda *_: None)
    assert run_settings(config, place) == {**without, FLOAT8: "tensorwise"}
    assert run_settings(replace(config, fp8=False), place) == without


def test_the_first_weights_follow_from_the_seed(config):
    """Whatever the generator's state is; another seed gives others."""
    first, again = (open_run(config).make_model() for _ in range(2))
    other = open_run(replace(config, seed=1)).make_model()
    weights = [model.lm_head.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
