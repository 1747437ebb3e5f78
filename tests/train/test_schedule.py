import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.train.schedule import rate_factor

SCHEDULES = ("cosine", "constant", "wsd")


def rates(max_steps, warmup_steps, schedule="cosine", min_ratio=0.1):
    return [
        rate_factor(
            step,
            max_steps=max_steps,
            warmup_steps=warmup_steps,
            min_ratio=min_ratio,
            schedule=schedule,
        )
        for step in range(max_steps)
    ]


@settings(max_examples=80, deadline=None)
@given(
    max_steps=st.integers(1, 60),
    warmup_steps=st.integers(0, 80),
    min_ratio=st.floats(0, 1),
    schedule=st.sampled_from(SCHEDULES),
)
def test_rates_rise_once_then_only_fall(max_steps, warmup_steps, min_ratio, schedule):
    """Every step moves, none is above the peak, and nothing falls below the end's share."""
    found = rates(max_steps, warmup_steps, schedule, min_ratio)
    warmup_steps = min(warmup_steps, max_steps)
    assert all(0 <= rate <= 1 + 1e-9 for rate in found)
    up, down = found[:warmup_steps], found[warmup_steps:]
    assert all(rate > 0 for rate in up)
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    assert all(rate >= min_ratio - 1e-9 for rate in down)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_last_step_is_at_the_end(schedule):
    """The schedule is used up, not stopped short."""
    assert rates(50, 5, schedule)[-1] == pytest.approx(0.1)


def test_warm_up_reaches_the_peak_on_its_last_step():
    """A quarter of the way each, for four steps."""
    assert rates(20, 4)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_a_run_shorter_than_its_warm_up_still_reaches_the_peak():
    """Four steps with ten of warm-up warm up over four."""
    assert rates(4, 10) == [0.25, 0.5, 0.75, 1.0]


def test_the_cosine_is_halfway_in_the_middle():
    """Halfway down between peak and end."""
    assert rates(100, 0)[49] == pytest.approx(0.55, abs=1e-3)


def test_the_constant_stays():
    """And so does warmup-stable-decay up to its last fifth, which is a straight line."""
    assert rates(10, 2, "constant")[2:] == [1.0] * 8
    found = rates(100, 10, "wsd")
    assert found[10:80] == [1.0] * 70
    steps = [right - left for left, right in zip(found[80:], found[81:], strict=False)]
    assert steps == pytest.approx([steps[0]] * 19)
