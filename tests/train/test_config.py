from pathlib import Path

import pytest

from qat.train.config import TrainConfig


def config(**changes):
    places = {name: Path(name) for name in ("v2_checkpoint", "cache_dir", "output_dir")}
    return TrainConfig(**{**places, **changes})


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, ("mlp", "attention")),
        ({"mlp_only": True}, ("mlp",)),
        ({"attn_only": True}, ("attention",)),
    ],
)
def test_kinds_follow_from_the_seeds_flags(changes, kinds):
    """Both kinds when neither is asked for."""
    assert config(**changes).kinds == kinds


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, ("weights", "scales")),
        ({"train_lut": True}, ("weights", "scales", "codebooks")),
        ({"trainable": ("codebooks",), "train_lut": True}, ("codebooks",)),
        ({"g_only": True}, ("magnitudes",)),
        ({"train_norms_only": True}, ("norms",)),
    ],
)
def test_parts_follow_from_the_seeds_flags(changes, parts):
    """Old words are aliases of the one field."""
    assert config(**changes).parts() == parts


def test_low_rank_scales_train_alone_unless_told_otherwise():
    """Beside latent weights they run away."""
    assert config().parts(is_low_rank=True) == ("scales",)
    assert config(train_lut=True).parts(is_low_rank=True) == ("scales", "codebooks")
    told = ("weights", "scales")
    assert config(trainable=told).parts(is_low_rank=True) == told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_only": True, "attn_only": True}, "exclude each other; leave out both"),
        ({"g_only": True, "train_norms_only": True}, "exclude each other; choose one"),
        ({"g_only": True, "freeze_mags": True}, "--freeze-mags leaves nothing of magnitudes"),
        ({"trainable": ()}, "--trainable is empty"),
        ({"max_steps": 0}, "--max-steps 0 must be 1 or more"),
        ({"batch_size": -1}, "--batch-size -1 must be 1 or more"),
        ({"accumulation_steps": 0}, "--accumulation-steps 0 must be 1 or more"),
        ({"log_steps": 0}, "--log-steps 0 must be 1 or more"),
        ({"eval_samples": 0}, "--eval-samples 0 must be 1 or more"),
        ({"save_steps": -1}, "--save-steps -1 must be 0 or more"),
        ({"warmup_steps": -1}, "--warmup-steps -1 must be 0 or more"),
        ({"clip_grad_norm": -1.0}, "--clip-grad-norm -1.0 must be 0 or more"),
        ({"lr": 0.0}, "--lr 0.0 must be above 0"),
        ({"min_lr_ratio": 1.5}, "--min-lr-ratio 1.5 within"),
        ({"ema_decay": 1.0}, "--ema-decay 1.0 must be within 0 and 1"),
        ({"curriculum": "64:5"}, "--curriculum 64:5 must be length:first step"),
        ({"curriculum": "x"}, "--curriculum x must be length:first step"),
        ({"curriculum": "1:0"}, "--curriculum 1:0 must be length:first step"),
    ],
)
def test_what_contradicts_itself_is_refused(changes, message):
    """With the flag, the value and the rule, before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_curriculum_is_lengths_by_their_first_step():
    """In any order; none without the flag."""
    assert config().lengths() == []
    assert config(curriculum="128:1000,64:0").lengths() == [(0, 64), (1000, 128)]


def test_the_seeds_loss_has_its_own_temperature():
    """Two for kd, one for the others, the one that is given for all."""
    assert config().loss_temperature == 1.0
    assert config(loss="kd").loss_temperature == 2.0
    assert config(loss="kd", temperature=3.0).loss_temperature == 3.0


def test_the_hard_loss_moves_in_a_straight_line():
    """From its first value at step 0 to its last at the last step; both names add up."""
    moving = config(max_steps=11, hard_top1=1.0, hard_top1_end=0.0, hard_full=0.5)
    assert [moving.hard_weight(step) for step in (0, 5, 10)] == [1.5, 1.0, 0.5]
    assert config(hard_top1=0.2).hard_weight(700) == 0.2
    assert not config().has_hard
    assert config(hard_top1_end=0.1).has_hard
