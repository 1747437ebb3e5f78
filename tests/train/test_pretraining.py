"""What a new model learns from: the next token of every position, in an order of its own."""

import math
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

from qat.data.token_dataset import TokenBlocks, TokenDataset
from qat.model.architectures import new_model, read_architecture
from qat.train import pretraining
from qat.train.config import RateConfig
from qat.train.dense_config import DenseOptimConfig
from qat.train.pretrain_config import PretrainConfig
from qat.train.pretraining import make_pretrainer, moving_average, token_batches
from tests.tiny import tiny_llama, tiny_shards

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return TokenDataset.open(tiny_shards(tmp_path_factory.mktemp("tokens")))


def settings(**changes):
    usual = {"data_dir": Path(), "output_dir": Path(), "seq_len": 16, "batch_size": 4}
    return PretrainConfig(**{**usual, **changes})


def pretrainer(model, dtype=torch.float32, **changes):
    return make_pretrainer(settings(**changes), model, dtype, sync=lambda: None)


def batches_of(tokens, config, start_step=0):
    return token_batches(partial(TokenBlocks, tokens, "train"), config, CPU, start_step)


def plain_loss(model, batches):
    """Return the mean nats of each label given what comes before it, one position at a time."""
    total, count = 0.0, 0
    for batch in batches:
        log_probs = torch.log_softmax(model(batch.token_ids).logits, dim=-1)
        for row, ids in enumerate(batch.token_ids.tolist()):
            for place in range(len(ids) - 1):
                if batch.mask[row, place]:
                    total = total - log_probs[row, place, ids[place + 1]]
                    count += 1
    return total / count


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_a_step_lowers_the_loss_of_the_next_token(tokens, tied, checkpointing):
    """Loss and gradients of two micro-batches are those of a loop over labels, shifted by one."""
    model = tiny_llama(tied=tied)
    trainer = pretrainer(model, gradient_checkpointing=checkpointing)
    batches = list(islice(batches_of(tokens, settings()), 2))
    assert not all(batch.mask.all() for batch in batches)
    model.train()
    loss = trainer.accumulate(batches, None)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    expected = plain_loss(model, batches)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        assert torch.allclose(found[name], parameter.grad, rtol=0, atol=1e-4 * scale), name


def test_a_model_that_copies_its_input_is_not_rewarded(tokens):
    """Labels that are not shifted would call a model perfect that repeats the current token."""
    batch = next(batches_of(tokens, settings()))
    trainer = pretrainer(tiny_llama())
    vocab_size = trainer.model.config.vocab_size
    copied = 50.0 * torch.nn.functional.one_hot(batch.token_ids[:, :-1], vocab_size)
    shifted = 50.0 * torch.nn.functional.one_hot(batch.token_ids[:, 1:], vocab_size)
    signal = batch.unpack()
    repeats = batch.token_ids[:, 1:] == batch.token_ids[:, :-1]
    assert not repeats.all()
    assert trainer.divergence(copied.float(), signal)[~repeats].min() > 40
    assert trainer.divergence(shifted.float(), signal).max() < 1e-3


def test_matrices_decay_and_vectors_do_not():
    """AdamW at 0.9 and 0.95; a tied matrix is there once."""
    trainer = pretrainer(tiny_llama())
    matrices, vectors = trainer.optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert matrices["betas"] == (0.9, 0.95)
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in vectors["params"]} == {1}
    assert trainer.num_trained == sum(p.numel() for p in tiny_llama().parameters())


def test_bfloat16_computes_and_float32_learns(tokens):
    """The loss is near that of float32; weights and gradients keep their dtype."""
    batch = [next(batches_of(tokens, settings()))]
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        trainer = pretrainer(tiny_llama(), dtype)
        losses.append(trainer.accumulate(batch, None).item())
        assert {p.grad.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0] != losses[1]


def test_batches_follow_from_the_step(tokens):
    """From any step of any stage on: what a run that began at the first has there."""
    plan = settings(curriculum="8:6:0,16:4:3,32:2:5", accumulation_steps=2, documents="separate")
    row = list(islice(batches_of(tokens, plan), 14))
    shapes = [tuple(batch.token_ids.shape) for batch in row]
    assert shapes == [(6, 8)] * 6 + [(4, 16)] * 4 + [(2, 32)] * 4
    for step in (1, 3, 4, 6):
        again = next(batches_of(tokens, plan, step))
        assert torch.equal(again.token_ids, row[2 * step].token_ids)
        assert torch.equal(again.document_ids, row[2 * step].document_ids)


def test_an_epoch_holds_every_block_once(tokens):
    """In another order than the text's, and another for another seed."""
    blocks = TokenBlocks(tokens, "train", 16)
    plan = settings(batch_size=1)
    epoch = islice(batches_of(tokens, plan), len(blocks))
    row = [batch.token_ids[0].tolist() for batch in epoch]
    text = [blocks[place].token_ids[0].tolist() for place in range(len(blocks))]
    assert row != text
    assert sorted(row) == sorted(text)
    one, other = (next(batches_of(tokens, settings(seed=seed))) for seed in (0, 1))
    assert not torch.equal(one.token_ids, other.token_ids)


def test_an_average_is_kept_where_it_is_asked_for():
    """Not with a decay of zero."""
    parameters = [torch.nn.Parameter(torch.ones(2))]
    assert moving_average(RateConfig(), parameters) is None
    assert moving_average(RateConfig(ema_decay=0.9), parameters).decay == 0.9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"curriculum": "8:4:1"}, "must be length:batch:first step from step 0 on"),
        ({"curriculum": "8:4:0,16:2:0"}, "must be length:batch:first step"),
        ({"curriculum": "8:4"}, "must be length:batch:first step"),
        ({"curriculum": "1:4:0"}, "length below 2"),
        ({"curriculum": "8:2147483648:0"}, "above 65536"),
        ({"batch_size": 0}, "--batch-size 0 must be 1 or more"),
        ({"optim": {"betas": (0.9, 1.0)}}, "--optim.betas"),
        ({"optim": {"betas": (0.9,)}}, "--optim.betas .* must be two"),
        ({"optim": {"warmup_ratio": 1.5}}, "--optim.warmup-ratio"),
    ],
)
def test_settings_out_of_range_are_refused(changes, said):
    """With the flag and its value."""

    def make():
        optim = changes.pop("optim", {})
        return settings(**changes, optim=DenseOptimConfig(**optim))

    with pytest.raises(ValueError, match=said):
        make()


def test_yxanuls_stages_grow_in_length_and_shrink_in_batch():
    """Ten of them, 8 tokens by 8192 to 2048 by 64, each a tenth of the steps."""
    stages = settings(curriculum="yxanul", max_steps=50_000).stages()
    assert [stage.first_step for stage in stages] == list(range(0, 50_000, 5000))
    assert (stages[0].seq_len, stages[0].batch_size) == (8, 8192)
    assert (stages[-1].seq_len, stages[-1].batch_size) == (2048, 64)
    lengths, batches = zip(*[(s.seq_len, s.batch_size) for s in stages], strict=True)
    assert list(lengths) == sorted(set(lengths))
    assert list(batches) == sorted(set(batches), reverse=True)


def test_warm_up_is_steps_or_a_share():
    """The share wins where it is given."""
    assert RateConfig(warmup_steps=7).warmup_of(1000) == 7
    assert RateConfig(warmup_steps=7, warmup_ratio=0.02).warmup_of(1000) == 20


def test_processes_that_read_ahead_change_nothing(tokens, monkeypatch):
    """Batches are those of one process, also from a step in the middle; no draw is taken."""
    plain = list(islice(batches_of(tokens, settings(), 3), 5))
    read_ahead = {"num_workers": 2, "prefetch_factor": 2}
    monkeypatch.setattr(pretraining, "loader_settings", lambda _device: read_ahead)
    state = torch.get_rng_state()
    found = list(islice(batches_of(tokens, settings(), 3), 5))
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(plain, found, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        assert torch.equal(one.mask, other.mask)


@pytest.mark.recipe
@pytest.mark.parametrize("name", ["kisoku-3.2b", "yxanul-197m"])
def test_large_shapes_take_steps(tokens, name):
    """Two steps of the real widths, heads and vocabulary; two of the decoder layers."""
    config = read_architecture(name)
    config.num_hidden_layers = 2
    model = new_model(config)
    uniform = math.log(config.vocab_size)
    trainer = pretrainer(model, optim=DenseOptimConfig(lr=1e-3))
    batch = next(batches_of(tokens, settings()))
    model.train()
    losses = [float(trainer.step([batch], 1.0)[0]) for _ in range(2)]
    assert losses[0] == pytest.approx(uniform, abs=1.0)
    assert losses[1] < losses[0]
