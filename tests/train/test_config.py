from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from qat.tracking.record import config_as_json, config_from_json
from qat.train.config import (
    IntervalsConfig,
    LayerwiseConfig,
    LossConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
)


def config(**changes):
    places = {name: Path(name) for name in ("checkpoint", "cache_dir", "output_dir")}
    return TrainConfig(**{**places, **changes})


@pytest.mark.parametrize(
    ("layers", "kinds"),
    [
        ("all", ("mlp", "attention", "other", "embedding", "head")),
        ("mlp", ("mlp",)),
        ("attention", ("attention",)),
    ],
)
def test_kinds_follow_from_layers(layers, kinds):
    """One field with named values."""
    assert config(layers=layers).kinds == kinds


@pytest.mark.parametrize(
    ("trainable", "grouped", "low_rank"),
    [
        (("auto",), ("weights", "scales"), ("scales",)),
        (("auto", "codebooks"), ("weights", "scales", "codebooks"), ("scales", "codebooks")),
        (("auto", "directions"), ("weights", "directions"), ("directions",)),
        (("weights", "scales"), ("weights", "scales"), ("weights", "scales")),
        (("magnitudes",), ("magnitudes",), ("magnitudes",)),
        (("norms", "norms"), ("norms",), ("norms",)),
    ],
)
def test_auto_is_what_suits_the_students_scales(trainable, grouped, low_rank):
    """Latent weights train with group scales; low-rank ones diverge with them."""
    plan = config(trainable=trainable)
    assert plan.parts() == grouped
    assert plan.parts(is_low_rank=True) == low_rank


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (config, {"trainable": ()}, "--trainable is empty"),
        (config, {"trainable": ("scales", "directions")}, "directions are scales without"),
        (config, {"max_steps": 0}, "--max-steps 0 must be 1 or more"),
        (config, {"seed": -1}, "--seed -1 must be 0 or more"),
        (config, {"seed": 2**63}, "--seed 9223372036854775808 must be 9223372036854775807 or less"),
        (config, {"batch_size": -1}, "--batch-size -1 must be 1 or more"),
        (config, {"accumulation_steps": 0}, "--accumulation-steps 0 must be 1 or more"),
        (config, {"batch_size": 2**31}, "--batch-size 2147483648 must be 65536 or less"),
        (config, {"curriculum": "64:5"}, "--curriculum 64:5 must be length:first step"),
        (config, {"curriculum": "x"}, "--curriculum x must be length:first step"),
        (config, {"curriculum": "1:0"}, "--curriculum 1:0 must be length:first step"),
        (IntervalsConfig, {"log_steps": 0}, "--intervals.log-steps 0 must be 1 or more"),
        (IntervalsConfig, {"eval_samples": 0}, "--intervals.eval-samples 0 must be 1 or more"),
        (IntervalsConfig, {"save_steps": -1}, "--intervals.save-steps -1 must be 0 or more"),
        (OptimConfig, {"warmup_steps": -1}, "--optim.warmup-steps -1 must be 0 or more"),
        (OptimConfig, {"clip_grad_norm": -1.0}, "--optim.clip-grad-norm -1.0 must be 0 or more"),
        (OptimConfig, {"lr": 0.0}, "--optim.lr 0.0 must be above 0"),
        (OptimConfig, {"min_lr_ratio": 1.5}, "--optim.min-lr-ratio 1.5 must be within"),
        (OptimConfig, {"ema_decay": 1.0}, "--optim.ema-decay 1.0 must be within 0 and 1"),
        (LossConfig, {"sampled_negatives": -1}, "--loss.sampled-negatives -1 must be 0 or more"),
        (LayerwiseConfig, {"epochs": 0}, "--layerwise.epochs 0 must be 1 or more"),
        (LayerwiseConfig, {"lr": -1.0}, "--layerwise.lr -1.0 must be above 0"),
    ],
)
def test_what_contradicts_itself_is_refused(make, changes, message):
    """With the flag, the value and the rule, before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_curriculum_is_lengths_by_their_first_step():
    """In any order; none without the flag."""
    assert config().lengths() == []
    assert config(curriculum="128:1000,64:0").lengths() == [(0, 64), (1000, 128)]


def test_the_loss_kd_has_its_own_temperature():
    """Two for kd, one for the others, the one that is given for all."""
    assert LossConfig().used_temperature == 1.0
    assert LossConfig(divergence="kd").used_temperature == 2.0
    assert LossConfig(divergence="kd", temperature=3.0).used_temperature == 3.0


def test_the_hard_loss_moves_in_a_straight_line():
    """From its first value at step 0 to its last at the last step; none where both are zero."""
    moving = config(max_steps=11, loss=LossConfig(hard_weight=1.5, hard_weight_end=0.5))
    assert [moving.hard_weight(step) for step in (0, 5, 10)] == [1.5, 1.0, 0.5]
    assert config(loss=LossConfig(hard_weight=0.2)).hard_weight(700) == 0.2
    assert config().hard_weight(0) is None
    assert config(max_steps=2, loss=LossConfig(hard_weight_end=0.1)).hard_weight(0) == 0


def another(hint, default):
    """Return a value of a field's type that is not its default."""
    if hint is bool:
        return not default
    if hint is float or hint == float | None:
        return 0.25
    if hint is int or hint == int | None:
        return 7
    if hint in (Path, Path | None):
        return Path("some/where")
    if hint in (str, str | None):
        return "64:0"  # also fits the curriculum
    if isinstance(default, tuple) or hint == tuple[str, ...] | None:
        return ("norms", "codebooks")
    options = get_args(hint)
    options = get_args(options[0]) or options  # of a choice that may be None
    return next(value for value in options if value != default)


def changed(config_type):
    """Return a config none of whose fields has its default."""
    hints = get_type_hints(config_type)
    return config_type(
        **{
            f.name: changed(hints[f.name])
            if is_dataclass(hints[f.name])
            else another(hints[f.name], None if f.default is MISSING else f.default)
            for f in fields(config_type)
        }
    )


def test_a_config_comes_back_from_json_the_same():
    """Every field in another value than its default: what a run's record holds is the whole run."""
    plan = changed(TrainConfig)
    assert plan.tracking != TrackingConfig()
    assert config_from_json(TrainConfig, config_as_json(plan)) == plan
    assert config_from_json(TrainConfig, config_as_json(config())) == config()
