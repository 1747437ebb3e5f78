"""Learning rates as a pure function of the step."""

import math
from typing import Literal

DECAY_SHARE = 0.2  # of the run: the falling end of warmup-stable-decay


def rate_factor(
    step: int,
    *,
    max_steps: int,
    warmup_steps: int,
    min_ratio: float,
    schedule: Literal["cosine", "constant", "wsd"] = "cosine",
) -> float:
    """Return the share of the peak rate at a step counted from 0.

    Args:
        step: 0 .. max_steps - 1.
        max_steps: Steps of the run.
        warmup_steps: Steps of the linear warm-up; the first one moves, the last is at the peak.
        min_ratio: Rate at the end over the peak.
        schedule: cosine: half a cosine down. constant: the peak. wsd: the peak, then a straight
            line down over the last fifth of the run (Hu et al. 2024, arXiv:2404.06395).
    """
    warmup_steps = min(warmup_steps, max_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    start = warmup_steps
    if schedule == "wsd":
        start = max(start, round(max_steps * (1 - DECAY_SHARE)))
        if step < start:
            return 1.0
    progress = min(1.0, (step - start + 1) / max(1, max_steps - start))
    shape = 1 - progress if schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return min_ratio + (1 - min_ratio) * shape
