"""The training loop: once in a while evaluate, save, log; else take a step."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tqdm import tqdm

from qat.train.state import Progress
from qat.train.step import Batch, Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Habits:
    """How often a run does what is not a step; 0 = never but at the ends."""

    max_steps: int
    accumulation_steps: int
    eval_steps: int
    log_steps: int
    save_steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """What the loop calls, so that it knows nothing of files or trackers."""

    rate: Callable[[int], float]
    """Share of the peak learning rate at a step."""
    evaluate: Callable[[], dict[str, float]]
    """Held-out numbers, kl_nats among them."""
    track: Callable[[int, Mapping[str, float]], None]
    keep_best: Callable[[dict[str, float], int], None]
    """Writes the student; called when kl_nats is the least so far."""
    save: Callable[[Progress], None]
    """Writes the state to resume from."""


def train_end_to_end(
    trainer: Trainer,
    batches: Iterator[Batch],
    habits: Habits,
    hooks: Hooks,
    progress: Progress | None = None,
) -> Progress:
    """Train to `max_steps` and return where the run stands.

    Args:
        trainer: Model, layers, optimizer.
        batches: Endless micro-batches on the device, from the run's position on.
        habits: How often what happens.
        hooks: What happens.
        progress: Where an earlier process stopped; None starts a run.

    Raises:
        FloatingPointError: If the loss is not finite; names the step.
    """
    resumed = progress is not None
    progress = progress or Progress()
    bar = tqdm(total=habits.max_steps, initial=progress.step, desc="train", unit="step")
    window = Window(progress)
    just_resumed = resumed
    while True:
        is_last = progress.step == habits.max_steps
        if not just_resumed:  # a state is saved after the step's evaluation
            window.pause()
            if is_last or progress.step == 0 or is_due(progress.step, habits.eval_steps):
                look(progress, hooks)
            if progress.step and (is_last or is_due(progress.step, habits.save_steps)):
                hooks.save(progress)
            window.go_on()
        if is_last:
            break
        just_resumed = False
        rate = hooks.rate(progress.step)
        micro_batches = [next(batches) for _ in range(habits.accumulation_steps)]
        loss, norm = trainer.step(micro_batches, rate)
        progress.step += 1
        progress.tokens_seen += sum(token_ids.numel() for token_ids, _ in micro_batches)
        progress.seconds = window.seconds()
        bar.update()
        if is_due(progress.step, habits.log_steps) or progress.step == habits.max_steps:
            values = window.log_values(progress, float(loss), float(norm), rate, trainer)
            progress.last_loss = values["train/loss"]
            hooks.track(progress.step, values)
            speed = f"{values['train/tokens_per_second']:.0f}"
            bar.set_postfix(loss=f"{values['train/loss']:.4f}", tokens_per_second=speed)
    bar.close()
    return progress


def is_due(step: int, every: int) -> bool:
    """Return whether something that happens every so many steps happens at this one."""
    return every > 0 and step % every == 0


def look(progress: Progress, hooks: Hooks) -> None:
    """Evaluate, track, and keep the student if it is the best so far."""
    values = progress.last_eval = hooks.evaluate()
    hooks.track(progress.step, {f"eval/{name}": v for name, v in values.items() if v is not None})
    kl_nats = values.get("kl_nats")
    if kl_nats is None:
        return
    if progress.best_kl_nats is None or kl_nats < progress.best_kl_nats:
        progress.best_kl_nats, progress.best_step = kl_nats, progress.step
        hooks.keep_best(values, progress.step)


class Window:
    """The clock of a run: time in steps only, speed since the last log line."""

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

    def go_on(self) -> None:
        """Start the clock again."""
        self.start = time.perf_counter()

    def log_values(
        self, progress: Progress, loss: float, norm: float, rate: float, trainer: Trainer
    ) -> dict[str, float]:
        """Return a log line's numbers; stops the run if the loss is not finite."""
        if not (loss == loss and abs(loss) != float("inf")):
            raise FloatingPointError(
                f"loss is {loss} at step {progress.step}; the last good state is kept: lower --lr "
                "or raise --warmup-steps"
            )
        tokens = progress.tokens_seen - self.last_tokens
        elapsed = max(progress.seconds - self.last_seconds, 1e-9)
        self.last_tokens, self.last_seconds = progress.tokens_seen, progress.seconds
        peak = max(group["peak_lr"] for group in trainer.optimizer.param_groups)
        return {
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/learning_rate": peak * rate,
            "train/tokens_seen": progress.tokens_seen,
            "train/tokens_per_second": tokens / elapsed,
            "train/seconds": progress.seconds,
        }
