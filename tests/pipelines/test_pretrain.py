from dataclasses import asdict, replace

import pytest
import torch

from qat.evaluate.on_tokens import evaluate_on_tokens
from qat.model.load import load_dense, load_tokenizer
from qat.pipelines import pretrain as pipeline
from qat.pipelines.open_checkpoint import open_checkpoint
from qat.pipelines.pretrain import open_run, pretrain
from qat.tracking.record import (
    SETTINGS,
    config_from_json,
    read_config,
    read_rows,
    read_summary,
)
from qat.train.config import IntervalsConfig
from qat.train.dense_config import DenseOptimConfig
from qat.train.pretrain_config import PretrainConfig
from tests.tiny import tiny_llama, tiny_shards


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Four steps of a tiny model on tiny shards."""
    folder = tmp_path_factory.mktemp("pretrain")
    shards = tiny_shards(folder)
    tiny_llama().config.save_pretrained(folder / "shape")
    (folder / "birds.txt").write_text("two small birds near the old boat. " * 3)
    return PretrainConfig(
        data_dir=shards,
        output_dir=folder / "run",
        arch=str(folder / "shape"),
        eval_sets=(f"nature={folder / 'birds.txt'}",),
        curriculum="8:8:0,16:4:2",
        max_steps=4,
        device="cpu",
        dtype="fp32",
        optim=DenseOptimConfig(lr=3e-3, warmup_steps=1),
        intervals=IntervalsConfig(log_steps=1, eval_steps=2, eval_samples=4, save_steps=2),
    )


def losses(folder):
    return [row["train/loss"] for row in read_rows(folder) if "train/loss" in row]


@pytest.mark.recipe
def test_a_run_leaves_a_model_that_anyone_can_load(config):
    """Its perplexity is the recorded best, its tokenizer that of the shards; it is found again."""
    result = pretrain(config)
    values = asdict(result)
    assert values.pop("checkpoint") == str(config.output_dir / "best")
    assert values == read_summary(config.output_dir)
    record = read_config(config.output_dir)
    assert config_from_json(PretrainConfig, record[SETTINGS]) == config
    model, run = load_dense(result.checkpoint), open_run(config)
    assert str(open_checkpoint(config.output_dir).path) == result.checkpoint
    assert sum(p.numel() for p in model.parameters()) == result.parameters
    assert len(load_tokenizer(result.checkpoint)) == run.heldout.tokens.manifest.vocab_size
    found = evaluate_on_tokens(
        model, run.heldout, device=torch.device("cpu"), num_sequences=4, is_separate=False
    )
    assert found["perplexity"] == pytest.approx(result.best_perplexity, rel=1e-5)
    rows = read_rows(config.output_dir)
    measured = [row["eval/perplexity"] for row in rows if "eval/perplexity" in row]
    assert measured[0] > measured[-1] == result.best_perplexity
    assert sum("eval/nature/perplexity" in row for row in rows) == len(measured) == 3
    assert pretrain(config) == result


@pytest.mark.recipe
def test_a_killed_run_has_the_same_losses(config, monkeypatch):
    """Stopped after its first state, it goes on to the bit, across stages of the curriculum."""
    pretrain(config)
    stopped = replace(config, output_dir=config.output_dir.parent / "stopped")
    batches = pipeline.token_batches

    def stop(*args):
        for number, batch in enumerate(batches(*args)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(pipeline, "token_batches", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(stopped)
    monkeypatch.undo()
    pretrain(stopped)
    assert losses(stopped.output_dir) == losses(config.output_dir)
    left, right = (load_dense(one.output_dir / "final").state_dict() for one in (config, stopped))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 200}, "has 200 rows and the tokenizer 261 tokens; give --vocab-size 261"),
        ({"curriculum": None, "seq_len": 300}, "has 256 positions, blocks have 300 tokens"),
        ({"arch": "big"}, "--arch big is not one of"),
        ({"max_steps": 5}, "holds a run with max_steps 4, this one has 5"),
    ],
)
def test_what_does_not_fit_is_refused(config, changes, said):
    """Before anything is made."""
    pretrain(config)
    with pytest.raises(ValueError, match=said):
        pretrain(replace(config, **changes))
