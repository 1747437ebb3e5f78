"""The largest batch that fits, from few probes: memory is nearly bytes = c + a * batch.

The line through small probes predicts; the prediction and the next size up are probed as well, so
the answer is measured, never extrapolated.
"""

import math
from collections.abc import Callable

STEP = 8  # sequences; smaller batches are halved down to one
GROWTH = 8  # times the largest that fits: no line is trusted further
BACK_OFF = 1 / 32  # of a batch that did not fit though the line said so: allocators need some room


def largest_batch(bytes_of: Callable[[int], int | None], limit_bytes: int | None) -> int:
    """Return a multiple of 8 that fits while the next one does not, or 4, 2, 1, or 0 for none.

    Args:
        bytes_of: Probes a batch; None where it does not fit. Asked once for any batch.
        limit_bytes: Memory that there is; None where the device cannot tell, then sizes double.
    """
    fitting: dict[int, int] = {}
    high: float = math.inf  # the smallest that does not fit
    batch = stride = STEP
    while True:
        num_bytes = bytes_of(batch)
        if num_bytes is None:
            high = batch
        else:
            fitting[batch] = num_bytes
        low = max(fitting, default=0)
        if high - low <= STEP and (low or high == 1):
            return low
        if not low:
            batch //= 2
            continue
        batch = predict(fitting, limit_bytes)
        if low < batch < high:
            stride = STEP
            continue
        if batch <= low:
            batch = int(min(low + stride, max(middle(low, high), low + STEP)))
        else:
            back = floor(high - max(stride, high * BACK_OFF))
            batch = int(max(back, middle(low, high), low + STEP))
        stride *= 2


def predict(fitting: dict[int, int], limit_bytes: int | None) -> int:
    """Return the largest batch that should fit, by the line through two that do.

    One probe gives a line through zero: it predicts less than fits, as c is not negative. The two
    lie a factor of two or more apart, so that noise does not tilt the line.
    """
    batch = max(fitting)
    if limit_bytes is None:
        return 2 * batch
    other = max((size for size in fitting if 2 * size <= batch), default=0)
    slope = (fitting[batch] - fitting.get(other, 0)) / (batch - other)
    if slope <= 0:
        return 2 * batch
    return floor(min(batch + (limit_bytes - fitting[batch]) / slope, GROWTH * batch))


def middle(low: float, high: float) -> float:
    """Return a multiple of the step between, by the geometric mean: sizes differ by factors."""
    return high if high == math.inf else floor(math.sqrt(low * high))


def floor(batch: float) -> int:
    """Return the largest multiple of the step that is no larger."""
    return int(batch // STEP) * STEP


def batches_below(largest: int, probed: list[int], budget: int) -> list[int]:
    """Return sizes that may be faster than the largest: its half and quarter, within a budget."""
    sizes = [floor(largest / 2), floor(largest / 4)]
    expected = [size for size in dict.fromkeys(sizes) if size and size not in probed]
    return expected[: max(0, budget - len(probed))]
