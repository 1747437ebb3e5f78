"""torch_xla's own counters, which tell what it did."""

from collections.abc import Callable


def happened(name: str) -> int:
    """Return how often a timed thing happened, such as CompileTime or TransferFromDeviceTime."""
    import torch_xla.debug.metrics

    values = torch_xla.debug.metrics.metric_data(name)
    return values[0] if values else 0


def counted(name: str) -> int:
    """Return a counter, such as PersistentCacheMiss."""
    import torch_xla.debug.metrics

    return torch_xla.debug.metrics.counter_value(name) or 0


def fallbacks() -> dict[str, int]:
    """Return the operations that XLA left to the CPU, with how often."""
    import torch_xla.debug.metrics

    names = torch_xla.debug.metrics.counter_names()
    counts = {name: torch_xla.debug.metrics.counter_value(name) for name in names}
    return {name: count for name, count in counts.items() if name.startswith("aten::") and count}


def during(name: str, act: Callable[[], object]) -> int:
    """Return how often a thing happened in an act."""
    before = happened(name)
    act()
    return happened(name) - before
