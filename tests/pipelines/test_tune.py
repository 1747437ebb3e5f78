"""Tuning on conversations: what the assistant says is learned, what the user says is not."""

from dataclasses import replace

import pytest
import torch

import qat
from qat.cache.config import BuildCacheConfig
from qat.cache.read import TeacherCache
from qat.model.load import load_dense, load_tokenizer
from qat.pipelines.build_cache import build_cache
from qat.pipelines.tune import open_run, tune
from qat.tracking.record import SETTINGS, config_from_json, read_config, read_rows
from qat.train.config import IntervalsConfig
from qat.train.pretraining import make_pretrainer
from qat.train.tune_config import TuneConfig, TuneOptimConfig
from tests.tiny import (
    save_student,
    save_tiny,
    tiny_llama,
    tiny_records,
    tiny_student,
    tiny_tokenizer,
    write_jsonl,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A few steps of a tiny model on Alpaca's form of records."""
    folder = tmp_path_factory.mktemp("tune")
    save_tiny(folder / "model", tiny_llama())
    return TuneConfig(
        model=str(folder / "model"),
        data=str(write_jsonl(folder / "alpaca.jsonl", tiny_records(40))),
        output_dir=folder / "run",
        heldout_ratio=0.2,
        seq_len=256,
        max_steps=12,
        batch_size=4,
        device="cpu",
        dtype="fp32",
        optim=TuneOptimConfig(lr=3e-3, warmup_steps=1),
        intervals=IntervalsConfig(log_steps=1, eval_steps=0, save_steps=0, eval_samples=16),
    )


@pytest.mark.recipe
def test_the_assistant_is_learned_and_the_model_teaches(config):
    """Held-out loss on its tokens falls; the folder is a model, of which a cache is built."""
    result = tune(config)
    rows = read_rows(config.output_dir)
    measured = [row["eval/perplexity"] for row in rows if "eval/perplexity" in row]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    assert measured[-1] < 0.5 * measured[0]
    assert result.best_perplexity == measured[-1]
    assert config_from_json(TuneConfig, read_config(config.output_dir)[SETTINGS]) == config
    assert tune(config) == result
    asked = BuildCacheConfig(
        teacher=result.checkpoint,
        data=config.data,
        output_dir=config.output_dir.parent,
        seq_len=32,
        top_k=4,
        thinking="false",
        device="cpu",
        dtype="fp32",
    )
    cache = TeacherCache.open(build_cache(asked).cache)
    batch = cache.batch([0])
    logits = load_dense(result.checkpoint)(batch.input_ids).logits
    likeliest = batch.fields["token_ids"][0, :, 0]
    assert torch.equal(likeliest.long(), logits[0, :-1].argmax(-1))
    place = {"device": "cpu", "dtype": "fp32"}
    student = config.output_dir.parent / "student"
    start = {"fit": "moments", "cache": cache.folder, "output": student, **place}
    qat.quantize(result.checkpoint, "q2a2", **start)
    run = config.output_dir.parent / "distilled"
    settings = {"max_steps": 32, "optim": {"lr": 5e-4}, **place}
    trained = qat.train(student, cache.folder, output_dir=run, **settings)
    measured = [row["eval/kl_nats_lower"] for row in read_rows(run) if "eval/kl_nats_lower" in row]
    assert trained.best_kl_nats_lower < measured[0], measured


def test_what_the_user_says_has_no_gradient(config):
    """Of all tokens exactly those of answers, the end of a turn among them, move the model."""
    run = open_run(config)
    batch = next(run.batches_from(CPU, 0))
    trainer = make_pretrainer(config, run.make_model(), torch.float32, sync=lambda: None)
    seen = []
    hook = trainer.model.model.norm.register_forward_hook(
        lambda _module, _inputs, output: (output.retain_grad(), seen.append(output))[0]
    )
    trainer.accumulate([batch], None)
    hook.remove()
    moves = seen[0].grad[:, :-1].abs().sum(-1) > 0
    assert torch.equal(moves, batch.mask)
    answers = [record["output"] + "<|im_end|>" for record in tiny_records(40)]
    tokenizer = tiny_tokenizer()
    for ids, counts in zip(batch.token_ids, batch.mask, strict=True):
        assert 0 < int(counts.sum()) < len(counts)
        said = tokenizer.decode(ids[1:][counts])
        whole = [part + "<|im_end|>" for part in said.split("<|im_end|>") if part.strip()]
        assert whole
        assert all(part.lstrip("\n") in answers for part in whole), said
    assert not torch.equal(batch.document_ids[:, 0], batch.document_ids[:, -1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seq_len": 300}, "--seq-len 300 is above the 256 positions"),
        ({"heldout_ratio": 0.0}, "--heldout-ratio 0.0 must be above 0"),
        ({"data": "absent.jsonl"}, "--data absent.jsonl does not exist"),
    ],
)
def test_what_does_not_fit_is_refused(config, tmp_path, changes, said):
    """Before anything is made."""
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        tune(replace(config, output_dir=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_students_few_records_and_tokenizers_without_a_template_are_refused(config, tmp_path):
    """With what to do instead."""
    few = write_jsonl(tmp_path / "few.jsonl", tiny_records(3))
    with pytest.raises(ValueError, match="0 of them held out; give more text or a shorter"):
        open_run(replace(config, data=str(few), seq_len=64))
    student = save_student(tmp_path / "student", tiny_student(), config.model)
    with pytest.raises(ValueError, match="holds quantized weights; `qat train` trains students"):
        tune(replace(config, model=str(student)))
    plain = save_tiny(tmp_path / "plain", tiny_llama(), tiny_tokenizer(chat_template=None))
    assert load_tokenizer(plain).chat_template is None
    with pytest.raises(ValueError, match="needs a chat template .*; pass --thinking none"):
        open_run(replace(config, model=str(plain)))
    run = open_run(replace(config, model=str(plain), thinking="none"))
    assert 0 < next(run.batches_from(CPU, 0)).mask.float().mean() < 1
