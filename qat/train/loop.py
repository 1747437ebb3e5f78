"""The training loop: once in a while evaluate, save, log; else take a step."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from tqdm import tqdm

from qat.tracking.record import kl_name
from qat.train.config import TrainConfig
from qat.train.dense_config import DenseConfig
from qat.train.state import Progress
from qat.train.step import Batch, Trainer

SPIKE_RATIO = 4.0  # of the smoothed loss: noise at 256 tokens a step stays below 1.5
SMOOTHING = 0.9
MAX_ROLLBACKS = 3


class DivergedError(ValueError):
    """The loss is not finite, or jumped; the state before it is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """What the loop calls, so that it knows nothing of files or trackers."""

    rate: Callable[[Progress], float]
    """Share of the peak learning rates at the next step."""
    hard_weight: Callable[[int], float | None]
    """Weight of the hard cross-entropy at a step; None where it is no part of the loss."""
    evaluate: Callable[[], dict[str, float]]
    """Held-out numbers, kl_nats or kl_nats_lower among them, or without a teacher perplexity."""
    track: Callable[[int, Mapping[str, float]], None]
    keep_best: Callable[[dict[str, float], int], None]
    """Writes the student; called when kl_nats, or what is in its place, is the least."""
    save: Callable[[Progress], None]
    """Writes the state to resume from."""
    restore: Callable[[], Progress | None]
    """Puts the last state back; None where there is none to go back to."""


class Report:
    """What a step tells, fetched from the device when it is asked for, in one look."""

    def __init__(self, loss: Tensor, norm: Tensor):
        self.tensors = (loss, norm)

    @cached_property
    def values(self) -> tuple[float, float]:
        """Loss and gradient norm."""
        loss, norm = torch.stack(self.tensors).tolist()
        return loss, norm


def train_end_to_end(
    trainer: Trainer,
    batches_from: Callable[[int], Iterator[Batch]],
    config: TrainConfig | DenseConfig,
    hooks: Hooks,
    progress: Progress | None = None,
) -> Progress:
    """Train to `max_steps` and return where the run stands.

    Args:
        trainer: Model, layers, optimizer.
        batches_from: Endless micro-batches on the device, from the first of a step on.
        config: Says how often what happens.
        hooks: What happens.
        progress: Where an earlier process stopped; None starts a run.

    Raises:
        DivergedError: If the loss is not finite or jumped and there is no going back.
    """
    rollbacks = progress.rollbacks if progress else 0
    while True:
        step = progress.step if progress else 0
        try:
            return take_steps(trainer, batches_from(step), config, hooks, progress)
        except DivergedError as error:
            rollbacks += 1
            progress = hooks.restore() if rollbacks <= MAX_ROLLBACKS else None
            if progress is None:
                raise
            progress.rollbacks = rollbacks
            tqdm.write(f"{error}: back to step {progress.step} at half the rate", file=sys.stderr)


def take_steps(
    trainer: Trainer,
    batches: Iterator[Batch],
    config: TrainConfig | DenseConfig,
    hooks: Hooks,
    progress: Progress | None,
) -> Progress:
    """Take steps to `max_steps`, looking up once in a while.

    Raises:
        DivergedError: If the loss is not finite or jumped; names the step.
    """
    is_resumed = progress is not None and progress.step > 0
    progress = progress or Progress()
    bar = tqdm(total=config.max_steps, initial=progress.step, desc="train", unit="step")
    clock = Clock(progress)
    report = None
    while True:
        is_last = progress.step == config.max_steps
        if not is_resumed:  # a state is saved after the step's evaluation
            clock.pause()
            if is_last or progress.step == 0 or is_due(progress.step, config.intervals.eval_steps):
                look(progress, hooks)
            if progress.step and (is_last or is_due(progress.step, config.intervals.save_steps)):
                check(progress, *report.values)
                if config.intervals.save_steps:
                    hooks.save(progress)
            clock.resume()
        if is_last:
            break
        is_resumed = False
        rate, hard_weight = hooks.rate(progress), hooks.hard_weight(progress.step)
        micro_batches = [next(batches) for _ in range(config.accumulation_steps)]
        report = Report(*trainer.step(micro_batches, rate, hard_weight))
        progress.step += 1
        progress.tokens_seen += sum(batch.num_tokens for batch in micro_batches)
        progress.seconds = clock.seconds()
        bar.update()
        if is_due(progress.step, config.intervals.log_steps) or progress.step == config.max_steps:
            loss, norm = report.values
            check(progress, loss, norm)
            values = clock.log_values(progress, norm, trainer.peak_rate() * rate)
            hooks.track(progress.step, values)
            speed = f"{values['train/tokens_per_second']:.0f}"
            bar.set_postfix(loss=f"{progress.last_loss:.4f}", tokens_per_second=speed)
    bar.close()
    return progress


def is_due(step: int, every: int) -> bool:
    """Return whether something that happens every so many steps happens at this one."""
    return every > 0 and step % every == 0


def look(progress: Progress, hooks: Hooks) -> None:
    """Evaluate, track, and keep the student if it is the best so far; refuse what is not finite."""
    values = progress.last_eval = hooks.evaluate()
    name = kl_name(values) or "perplexity"
    if values.get(name) is not None and not math.isfinite(values[name]):
        raise DivergedError(f"{name} is {values[name]} at step {progress.step}")
    hooks.track(progress.step, {f"eval/{name}": v for name, v in values.items() if v is not None})
    if values.get(name) is None:
        return
    best = getattr(progress, f"best_{name}")
    if best is None or values[name] < best:
        setattr(progress, f"best_{name}", values[name])
        progress.best_step = progress.step
        hooks.keep_best(values, progress.step)


def check(progress: Progress, loss: float, norm: float) -> None:
    """Take in a loss that is read anyway; refuse one that is not finite or jumped.

    A gradient that is not finite has spoilt the weights, though this step's loss was made before.
    """
    smooth = progress.smooth_loss
    if not math.isfinite(loss) or (smooth is not None and loss > SPIKE_RATIO * smooth + 1.0):
        raise DivergedError(
            f"loss is {loss:.4g} at step {progress.step}"
            + (f", it was {smooth:.4g}" if smooth is not None else "")
        )
    if not math.isfinite(norm):
        raise DivergedError(f"gradient norm is {norm:.4g} at step {progress.step}")
    progress.last_loss = loss
    progress.smooth_loss = loss if smooth is None else SMOOTHING * smooth + (1 - SMOOTHING) * loss


class Clock:
    """The time spent in steps, and the speed since the last log line."""

    def __init__(self, progress: Progress):
        self.before = self.last_seconds = progress.seconds
        self.last_tokens = progress.tokens_seen
        self.start: float | None = time.perf_counter()

    def seconds(self) -> float:
        """Return the time spent in steps, earlier processes included."""
        running = time.perf_counter() - self.start if self.start is not None else 0.0
        return self.before + running

    def pause(self) -> None:
        """Stop the clock for an evaluation or a save."""
        self.before, self.start = self.seconds(), None

    def resume(self) -> None:
        """Start the clock again."""
        self.start = time.perf_counter()

    def log_values(self, progress: Progress, norm: float, rate: float) -> dict[str, float]:
        """Return the numbers of a log line."""
        tokens = progress.tokens_seen - self.last_tokens
        elapsed = max(progress.seconds - self.last_seconds, 1e-9)
        self.last_tokens, self.last_seconds = progress.tokens_seen, progress.seconds
        return {
            "train/loss": progress.last_loss,
            "train/grad_norm": norm,
            "train/learning_rate": rate,
            "train/tokens_seen": progress.tokens_seen,
            "train/tokens_per_second": tokens / elapsed,
            "train/seconds": progress.seconds,
        }
