"""The loop with a trainer that only counts: what happens when, and what a restart sees."""

import copy
import math
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qat.train.config import IntervalsConfig, TrainConfig
from qat.train.loop import DivergedError, Hooks, train_end_to_end
from qat.train.state import Progress

TOKENS = 12  # of a micro-batch


class FakeTrainer:
    """Takes steps whose loss is looked up."""

    def __init__(self, losses=None, norms=None):
        self.losses = losses or {}
        self.norms = norms or {}
        self.seen = []
        self.rates = []

    def step(self, batches, rate, hard_weight):
        self.seen.append([batch.number for batch in batches])
        self.rates.append(rate)
        loss = self.losses.pop(len(self.seen), 1.0 / len(self.seen))
        return torch.tensor(loss), torch.tensor(self.norms.pop(len(self.seen), 0.5))

    def peak_rate(self):
        return 2.0


class Story:
    """Hooks that write down what happened."""

    def __init__(self, distances=(), *, restores=True):
        self.distances = iter(distances)
        self.events = []
        self.rows = []
        self.saved = None
        self.restores = restores

    def hooks(self):
        return Hooks(
            rate=lambda progress: 0.5**progress.rollbacks,
            hard_weight=lambda step: None,
            evaluate=self.evaluate,
            track=lambda step, values: self.rows.append((step, dict(values))),
            keep_best=lambda values, step: self.events.append(("best", step)),
            save=self.save,
            restore=lambda: copy.deepcopy(self.saved) if self.restores else None,
        )

    def evaluate(self):
        self.events.append("evaluate")
        return {"kl_nats": next(self.distances, 1.0), "perplexity": None}

    def save(self, progress):
        self.events.append(("save", progress.step))
        self.saved = copy.deepcopy(progress)


def intervals(*, max_steps=6, accumulation_steps=1, **changes):
    return TrainConfig(
        **dict.fromkeys(("checkpoint", "cache_dir", "output_dir"), Path()),
        max_steps=max_steps,
        accumulation_steps=accumulation_steps,
        batch_size=3,
        intervals=IntervalsConfig(**{"eval_steps": 0, "log_steps": 1, "save_steps": 0, **changes}),
    )


def batches_from(step, accumulation_steps=1):
    """Yield numbered micro-batches, as if those of earlier steps had been given."""
    return (
        SimpleNamespace(num_tokens=TOKENS, number=number)
        for number in count(step * accumulation_steps)
    )


def test_a_run_looks_before_after_and_between():
    """Evaluations at both ends and every two steps; the best student is kept when it is found."""
    story = Story([3.0, 2.0, 2.5, 1.0])
    progress = train_end_to_end(FakeTrainer(), batches_from, intervals(eval_steps=2), story.hooks())
    evaluated = [step for step, values in story.rows if "eval/kl_nats" in values]
    assert evaluated == [0, 2, 4, 6]
    assert [event for event in story.events if event != "evaluate"] == [
        ("best", 0),
        ("best", 2),
        ("best", 6),
    ]
    assert (progress.best_kl_nats, progress.best_step) == (1.0, 6)
    assert all("eval/perplexity" not in values for _, values in story.rows)


def test_a_bound_chooses_the_best_where_the_exact_distance_is_not_known():
    """On a cache of some tokens the least lower bound is kept, under its own name."""
    story = Story()
    bounds = iter([3.0, 1.0, 2.0])
    hooks = replace(
        story.hooks(), evaluate=lambda: {"kl_nats": None, "kl_nats_lower": next(bounds)}
    )
    progress = train_end_to_end(FakeTrainer(), batches_from, intervals(eval_steps=3), hooks)
    assert story.events == [("best", 0), ("best", 3)]
    assert (progress.best_kl_nats, progress.best_kl_nats_lower) == (None, 1.0)


def test_perplexity_chooses_the_best_where_there_is_no_teacher():
    """A new model is kept when the held-out perplexity is the least."""
    story = Story()
    found = iter([9.0, 5.0, 7.0])
    hooks = replace(story.hooks(), evaluate=lambda: {"perplexity": next(found)})
    progress = train_end_to_end(FakeTrainer(), batches_from, intervals(eval_steps=3), hooks)
    assert story.events == [("best", 0), ("best", 3)]
    assert (progress.best_perplexity, progress.best_step) == (5.0, 3)


def test_a_distance_that_is_not_known_is_no_best():
    """None is not better than anything."""
    story = Story([None, None])
    progress = train_end_to_end(FakeTrainer(), batches_from, intervals(), story.hooks())
    assert progress.best_step is None
    assert story.events == ["evaluate", "evaluate"]


def test_every_step_is_counted():
    """Steps, tokens of all micro-batches, loss of the last step, rate of each."""
    story, trainer = Story(), FakeTrainer()
    progress = train_end_to_end(
        trainer,
        lambda step: batches_from(step, 2),
        intervals(accumulation_steps=2),
        story.hooks(),
    )
    assert trainer.seen == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert progress.step == 6
    assert progress.tokens_seen == 6 * 2 * TOKENS
    assert progress.last_loss == pytest.approx(1 / 6)
    rows = [(step, values) for step, values in story.rows if "train/loss" in values]
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0][1]["train/learning_rate"] == 2.0
    assert rows[-1][1]["train/tokens_seen"] == 6 * 2 * TOKENS


def test_log_lines_come_as_asked_and_at_the_end():
    """Every four steps, and the last."""
    story = Story()
    train_end_to_end(FakeTrainer(), batches_from, intervals(log_steps=4), story.hooks())
    assert [step for step, values in story.rows if "train/loss" in values] == [4, 6]


def test_states_are_saved_as_asked_and_at_the_end():
    """Every four steps and the last; never with 0."""
    story = Story()
    train_end_to_end(FakeTrainer(), batches_from, intervals(save_steps=4), story.hooks())
    assert [event for event in story.events if event[0] == "save"] == [("save", 4), ("save", 6)]
    story = Story()
    train_end_to_end(FakeTrainer(), batches_from, intervals(), story.hooks())
    assert story.saved is None


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_a_resumed_run_tells_the_rest_of_the_same_story(stop):
    """From a saved state on: the same batches, rows and events as without the stop."""
    distances = [3.0, 2.0, 2.5, 1.0]
    straight, trainer = Story(distances), FakeTrainer()
    plan = intervals(eval_steps=2, save_steps=2)
    saved = {}
    hooks = straight.hooks()
    original = straight.save

    def save(progress):
        original(progress)
        saved[progress.step] = (copy.deepcopy(progress), len(straight.rows), len(straight.events))

    hooks = Hooks(**{name: getattr(hooks, name) for name in Hooks.__slots__} | {"save": save})
    train_end_to_end(trainer, batches_from, plan, hooks)

    progress, num_rows, num_events = saved[stop]
    resumed = Story(distances[stop // 2 + 1 :])
    again = FakeTrainer({n: 1.0 / (n + stop) for n in range(1, 7)})
    train_end_to_end(again, batches_from, plan, resumed.hooks(), progress)
    assert again.seen == trainer.seen[stop:]
    assert resumed.events == straight.events[num_events:]
    steps = [(step, values.get("train/loss")) for step, values in resumed.rows]
    assert steps == [
        (step, pytest.approx(values["train/loss"]) if "train/loss" in values else None)
        for step, values in straight.rows[num_rows:]
    ]


def test_a_gradient_that_is_not_finite_is_never_saved():
    """The loss of that step was made before the weights were spoilt."""
    story, trainer = Story(), FakeTrainer(norms={4: math.nan})
    progress = train_end_to_end(
        trainer, batches_from, intervals(log_steps=100, save_steps=2), story.hooks()
    )
    assert [numbers[0] for numbers in trainer.seen] == [0, 1, 2, 3, 2, 3, 4, 5]
    assert progress.rollbacks == 1


@pytest.mark.parametrize("loss", [math.nan, math.inf, 50.0])
def test_a_loss_that_breaks_out_stops_the_run(loss):
    """Not finite, or a jump: the step is named, and the student is not evaluated any more."""
    story = Story(restores=False)
    with pytest.raises(DivergedError, match="at step 3"):
        train_end_to_end(FakeTrainer({3: loss}), batches_from, intervals(), story.hooks())
    assert story.events == ["evaluate", ("best", 0)]


@pytest.mark.parametrize("distance", [math.nan, math.inf])
@pytest.mark.parametrize("before", [[], [1.0]])
def test_an_evaluation_that_is_not_finite_stops_the_run(distance, before):
    """It is never the best, which nothing would come below; at the start or later."""
    story, settings = Story([*before, distance], restores=False), intervals(eval_steps=3)
    with pytest.raises(DivergedError, match=rf"kl_nats is \w+ at step {3 * len(before)}"):
        train_end_to_end(FakeTrainer(), batches_from, settings, story.hooks())
    assert story.events.count(("best", 0)) == len(before)
    assert len(story.events) == 1 + 2 * len(before)


def test_going_back_replays_from_the_state_at_half_the_rate():
    """The steps since the state are taken again, with the same batches."""
    story, trainer = Story(), FakeTrainer({4: math.nan})
    progress = train_end_to_end(trainer, batches_from, intervals(save_steps=2), story.hooks())
    assert [numbers[0] for numbers in trainer.seen] == [0, 1, 2, 3, 2, 3, 4, 5]
    assert trainer.rates == [1.0] * 4 + [0.5] * 4
    assert progress.rollbacks == 1
    assert progress.step == 6


def test_a_run_that_keeps_breaking_stops():
    """Three times back, then it is the user's turn."""
    story = Story()
    trainer = FakeTrainer(dict.fromkeys(range(4, 40), math.nan))
    with pytest.raises(DivergedError, match="loss is nan"):
        train_end_to_end(trainer, batches_from, intervals(save_steps=2), story.hooks())
    assert len(trainer.seen) == 4 + 3


def test_a_bad_state_is_never_saved():
    """The loss is looked at before each save, also between log lines."""
    story = Story(restores=False)
    with pytest.raises(DivergedError):
        train_end_to_end(
            FakeTrainer({4: math.nan}),
            batches_from,
            intervals(log_steps=100, save_steps=2),
            story.hooks(),
        )
    assert story.saved.step == 2


def test_a_finished_run_is_not_taken_up_again():
    """A state of the last step has nothing left to do."""
    story, trainer = Story(), FakeTrainer()
    progress = train_end_to_end(
        trainer, batches_from, intervals(), story.hooks(), Progress(step=6, tokens_seen=72)
    )
    assert trainer.seen == []
    assert story.events == []
    assert progress.tokens_seen == 72
