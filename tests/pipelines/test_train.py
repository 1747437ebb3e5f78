from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import pytest
import torch

from qat.model.checkpoint import read_header
from qat.model.layered import NeedsWhole
from qat.model.surgery import quantized_layers
from qat.pipelines import train as train_module
from qat.pipelines.open_checkpoint import open_checkpoint
from qat.pipelines.train import train
from qat.tracking.record import (
    SETTINGS,
    config_from_json,
    read_config,
    read_rows,
    read_summary,
)
from qat.train import blockwise
from qat.train import layerwise as layerwise_module
from qat.train.config import IntervalsConfig, LayerwiseConfig, OptimConfig, TrainConfig
from qat.train.layerwise import read_blocks
from tests.tiny import save_student, tiny_cache, tiny_llama, tiny_student


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A short run on a tiny student and its teacher's cache."""
    folder = tmp_path_factory.mktemp("train")
    cache = tiny_cache(folder, tiny_llama())
    base = {"path": str(folder / "teacher"), "name": "teacher", "weights": None}
    student = save_student(folder / "q2", tiny_student(), folder / "teacher", base_model=base)
    return TrainConfig(
        checkpoint=student,
        cache_dir=cache,
        output_dir=folder / "run",
        max_steps=2,
        batch_size=2,
        device="cpu",
        dtype="fp32",
        optim=OptimConfig(lr=1e-3),
        intervals=IntervalsConfig(log_steps=1, eval_samples=2),
    )


@pytest.fixture(scope="module")
def layerwise(config):
    """The layer-by-layer stage alone, whose teacher is read one decoder layer at a time."""
    stage = LayerwiseConfig(sequences=8, epochs=2, lr=1e-3)
    alone = replace(config, output_dir=config.output_dir / "alone", max_steps=0, layerwise=stage)
    return alone, train(alone)


def test_a_stage_alone_leaves_what_its_blocks_learned(layerwise, config):
    """To the bit, as indices, nearer to the teacher than before."""
    alone, result = layerwise
    assert (result.steps, result.final_loss) == (0, None)
    assert result.best_kl_nats_lower < measured(config)
    expected = open_checkpoint(config.checkpoint).load()
    assert read_blocks(alone.output_dir / "blocks", expected)[0] == 2
    student = open_checkpoint(alone.output_dir / "final").load()
    expected, found = (quantized_layers(one) for one in (expected, student))
    for name, layer in found.items():
        assert layer.latent_weight is None
        assert torch.equal(layer.fake_quantized_weight(), expected[name].fake_quantized_weight())


@pytest.mark.recipe
def test_a_teacher_read_by_layers_teaches_as_a_whole_one(layerwise, config, monkeypatch):
    """Which it is where its files do not let that, and a stage that ended is not taken again."""
    alone, result = layerwise

    def refuse(_name, _dtype):
        raise NeedsWhole("its weights are in other files")

    monkeypatch.setattr(train_module, "open_layered", refuse)
    whole = replace(alone, output_dir=config.output_dir / "whole")
    assert train(whole).best_kl_nats_lower == result.best_kl_nats_lower
    folders = (alone.output_dir, whole.output_dir)
    assert len({read_header(folder / "final").sha256 for folder in folders}) == 1
    (whole.output_dir / "summary.json").unlink()
    monkeypatch.setattr(layerwise_module, "train_blockwise", None)
    assert train(whole).best_kl_nats_lower == result.best_kl_nats_lower


@pytest.mark.recipe
def test_a_stage_alone_goes_on_where_it_was_stopped(layerwise, config, monkeypatch):
    """With the blocks that were done; the same student, to the bit."""
    alone, result = layerwise
    train_block, counts = blockwise.train_block, count(1)

    def stop_at_second(*args):
        if next(counts) == 2:
            raise KeyboardInterrupt
        return train_block(*args)

    monkeypatch.setattr(blockwise, "train_block", stop_at_second)
    stopped = replace(alone, output_dir=config.output_dir / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    done = train(stopped)
    assert done.best_kl_nats_lower == result.best_kl_nats_lower
    assert next(counts) == 4  # one of the first call, the one that was stopped, and it again
    folders = (alone.output_dir, stopped.output_dir)
    assert len({read_header(folder / "final").sha256 for folder in folders}) == 1


def measured(config):
    """Return the held-out KL of the student that a run starts from."""
    folder = config.output_dir / "before"
    numbers = train(replace(config, output_dir=folder, eval_only=True)).numbers
    return numbers["kl_nats_lower"]


@pytest.mark.recipe
def test_a_run_is_a_function_from_its_config_to_its_result(config):
    """The summary on disk is the result, the record gives the config; the caller's generator stays.

    A second call finds the run complete.
    """
    torch.manual_seed(3)
    state = torch.get_rng_state()
    result = train(config)
    assert torch.equal(torch.get_rng_state(), state)
    values = asdict(result)
    assert values.pop("checkpoint") == str(config.output_dir / "best")
    assert values == read_summary(config.output_dir)
    assert config_from_json(TrainConfig, read_config(config.output_dir)[SETTINGS]) == config
    assert train(config) == result


@pytest.mark.recipe
def test_weights_formed_in_use_end_where_those_formed_once_do(config, tmp_path):
    """The same losses, of the same run by its identity."""
    recomputed = replace(config, gradient_checkpointing=True)
    losses = {}
    for how in ("once", "in-use"):
        run = replace(recomputed, form_weights=how, output_dir=tmp_path / how)
        train(run)
        losses[how] = [
            row["train/loss"] for row in read_rows(run.output_dir) if "train/loss" in row
        ]
        assert read_config(run.output_dir)["identity"]["settings"].get("form_weights") is None
    assert losses["in-use"] == pytest.approx(losses["once"], rel=1e-5)
    with pytest.raises(ValueError, match="in-use without --gradient-checkpointing would keep all"):
        replace(config, form_weights="in-use")


@pytest.mark.recipe
def test_texts_are_measured_next_to_the_cache(config, tmp_path):
    """At every evaluation, kept with the student; a look without training finds them again."""
    (tmp_path / "birds.txt").write_text("two small birds near the old boat. " * 3)
    (tmp_path / "cats.txt").write_text("the cat sees a red boat. " * 4)
    sets = (f"nature={tmp_path / 'birds.txt'},{tmp_path / 'cats.txt'}",)
    run = replace(config, output_dir=tmp_path / "run", eval_sets=sets)
    at_start = train(replace(run, eval_only=True))
    assert at_start.checkpoint == str(config.checkpoint)
    assert not run.output_dir.exists()
    best = train(run).best_step
    rows = {row["step"]: row for row in read_rows(run.output_dir) if "eval/perplexity" in row}
    assert list(rows) == [0, 2]
    found = train(replace(run, eval_only=True))
    assert found.checkpoint == str(run.output_dir / "best")
    for name in ("perplexity", "kl_nats_lower", "nature/perplexity", "cats/perplexity"):
        assert at_start.numbers[name] == pytest.approx(rows[0][f"eval/{name}"], rel=1e-5)
        assert found.numbers[name] == pytest.approx(rows[best][f"eval/{name}"], rel=1e-5)


def test_a_full_precision_model_is_refused(config):
    """With the command that makes a student of it."""
    teacher = Path(config.checkpoint).parent / "teacher"
    with pytest.raises(ValueError, match="is a full-precision model; `qat init-student` makes"):
        train(replace(config, checkpoint=teacher))
