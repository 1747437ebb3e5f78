import shlex

import pytest
import tyro

from qat.benchmark.config import BenchmarkConfig
from qat.legacy.flags import benchmark_flags, flags_help, train_flags
from qat.train.config import TrainConfig

PLACES = "--v2-checkpoint q2 --cache-dir cache --output-dir run"


def parse(line):
    """Return the config that a command line of the seeds asks for."""
    return tyro.cli(TrainConfig, args=train_flags(shlex.split(f"{PLACES} {line}")))


def test_the_seeds_command_works_as_it_was_typed():
    """The line of the speedrun, and the flags of a notebook: each reaches its field."""
    found = parse(
        "--mlp-only --max-steps 4000 --batch-size 4 --lr 5e-5 --wandb --wandb-run SR-002 "
        "--gdrive-dir drive/runs --constant-lr --warmup-steps 100 --min-lr-ratio 0.2 "
        "--accumulation-steps=2 --clip-grad-norm 0.5 --weight-decay 0.01 --save_steps 500 "
        "--keep-checkpoints 3 --eval-steps 50 --eval-samples 40 --wandb-project qwen3-qat "
        "--gradient-checkpointing --dtype fp32 --model-id base --temperature 2.0"
    )
    assert (str(found.checkpoint), found.layers, found.max_steps) == ("q2", "mlp", 4000)
    assert (found.batch_size, found.accumulation_steps, found.model_id) == (4, 2, "base")
    assert (found.gradient_checkpointing, found.dtype) == (True, "fp32")
    optim, intervals, tracking = found.optim, found.intervals, found.tracking
    assert (optim.lr, optim.schedule, optim.warmup_steps) == (5e-5, "constant", 100)
    assert (optim.min_lr_ratio, optim.clip_grad_norm, optim.weight_decay) == (0.2, 0.5, 0.01)
    assert (intervals.save_steps, intervals.keep_checkpoints) == (500, 3)
    assert (intervals.eval_steps, intervals.eval_samples) == (50, 40)
    assert (tracking.to, tracking.name, tracking.project) == ("wandb", "SR-002", "qwen3-qat")
    assert (str(tracking.copy_to), found.loss.temperature) == ("drive/runs", 2.0)


@pytest.mark.parametrize("flag", ["--skip-checkpointing", "--skip_checkpointing"])
def test_the_seeds_benchmark_flags_reach_their_fields(flag):
    """Their word for no gradient checkpointing, and what is named alike."""
    argv = benchmark_flags([flag, "--steps", "50"])
    found = tyro.cli(BenchmarkConfig, args=argv)
    assert (found.gradient_checkpointing, found.steps) == (False, 50)


@pytest.mark.parametrize(
    ("line", "grouped", "low_rank"),
    [
        ("", ("weights", "scales"), ("scales",)),
        ("--g-only", ("magnitudes",), ("magnitudes",)),
        ("--train-norms-only", ("norms",), ("norms",)),
        ("--freeze-mags", ("weights", "directions"), ("directions",)),
        ("--train-lut", ("weights", "scales", "codebooks"), ("scales", "codebooks")),
        (
            "--freeze-mags --train-lut",
            ("weights", "directions", "codebooks"),
            ("directions", "codebooks"),
        ),
        ("--trainable weights norms", ("weights", "norms"), ("weights", "norms")),
    ],
)
def test_what_trains_is_what_the_flags_mean(line, grouped, low_rank):
    """For students with group scales and with low-rank ones."""
    assert parse(line).parts() == grouped
    assert parse(line).parts(is_low_rank=True) == low_rank


@pytest.mark.parametrize(
    ("line", "weights"),
    [
        ("", (0.0, None)),
        ("--hard-top1 0.2", (0.2, None)),
        ("--hard-top1 0.2 --hard-full 0.5", (0.7, None)),
        ("--hard-full 0.5", (0.5, None)),
        ("--hard-top1 0.2 --hard-top1-end 0.1 --hard-full 0.5", (0.7, 0.6)),
    ],
)
def test_both_names_of_the_hard_loss_add_up(line, weights):
    """One weight of one cross-entropy."""
    loss = parse(line).loss
    assert (loss.hard_weight, loss.hard_weight_end) == weights


def test_negatives_are_drawn_only_where_full_logits_are_not_formed():
    """A number of negatives alone changed nothing."""
    assert parse("--sampled-negatives 64").loss.sampled_negatives == 0
    assert parse("--no-full-logits").loss.sampled_negatives == 4096
    assert parse("--sampled-negatives 64 --no-full-logits").loss.sampled_negatives == 64


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--mlp-only --attn-only", "--mlp-only and --attn-only exclude each other"),
        ("--g-only --train-norms-only", "--g-only and --train-norms-only exclude each other"),
        ("--g-only --freeze-mags", "--g-only and --freeze-mags exclude each other"),
        ("--train-lut --trainable norms", "--train-lut and --trainable exclude each other"),
        ("--hard-full x", "--hard-full x is no number"),
        ("--lr", "--lr lacks its value"),
    ],
)
def test_what_contradicts_itself_is_refused(line, message):
    """In the flags that were typed."""
    with pytest.raises(ValueError, match=message):
        parse(line)


def test_flags_of_ours_go_through():
    """Also between the seeds' own."""
    found = parse("--layers attention --optim.lr 1e-3 --hard-top1 0.1 --seed 3")
    assert (found.layers, found.optim.lr, found.loss.hard_weight, found.seed) == (
        *("attention", 1e-3, 0.1),
        3,
    )
    assert "--mlp-only" in flags_help()
