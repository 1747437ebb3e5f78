"""Learning rates as a pure function of the step."""

import math


def rate_factor(
    step: int, *, max_steps: int, warmup_steps: int, min_ratio: float, is_constant: bool = False
) -> float:
    """Return the share of the peak rate at a step counted from 0.

    Linear warm-up whose first step already moves, then half a cosine down to `min_ratio`.

    Args:
        step: 0 .. max_steps - 1.
        max_steps: Steps of the run.
        warmup_steps: Steps of the warm-up; the peak is reached on the last of them.
        min_ratio: Rate at the end over the peak.
        is_constant: Stay at the peak after warm-up.
    """
    warmup_steps = min(warmup_steps, max_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if is_constant:
        return 1.0
    progress = (step - warmup_steps + 1) / max(1, max_steps - warmup_steps)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
