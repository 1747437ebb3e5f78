"""The hours that training takes on accelerators, from config, plan and their peak rates alone.

Each token costs 2 operations a weight in its products forward, twice that backward:

    forward      2 M + 2 q T a decoder layer    M weights of linears and head, q the width of all
                                                queries, T tokens of a sequence, of which half are
                                                seen on average
    pretrain     3 forward
    distil       3 forward + 2 H V              the teacher's head, on its hidden states
    build-cache  forward, without the head

A share of the peak is reached (MFU): 0.4 is what well-kept trainers reach at lengths of 1,024 and
more, and a goal at shorter ones. Forming quantized weights is not counted: it is once a step.

Source: the count of Kaplan et al. 2020, arXiv:2001.08361, and of PaLM, Chowdhery et al. 2022,
arXiv:2204.02311, appendix B, with causal attention counted by half.
"""

from dataclasses import dataclass, replace

import torch

from qat.pipelines.planned_memory import (
    ModelSizes,
    Situation,
    pretraining_bytes,
    training_bytes,
)

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """Chips that are rented as one."""

    peak: float
    """Operations a second of each chip, dense, in its 16-bit dtype."""
    memory: float
    """Bytes of each chip."""
    chips: int = 1
    dtype: torch.dtype = torch.bfloat16


# Makers' figures, without sparsity.
ACCELERATORS = {
    "T4": Accelerator(peak=65e12, memory=16e9, dtype=torch.float16),
    "A100": Accelerator(peak=312e12, memory=80e9),
    "H100": Accelerator(peak=989e12, memory=80e9),
    "B200": Accelerator(peak=2250e12, memory=180e9),
    "v6e-1": Accelerator(peak=918e12, memory=32e9),
    "v6e-8": Accelerator(peak=918e12, memory=32e9, chips=8),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Hours and memory of training on an accelerator."""

    pretrain_hours: float
    distil_hours: float
    cache_hours: float
    pretrain_bytes: int
    """Of each chip, at its peak; several hold rows of the weights each."""
    distil_bytes: int
    """The same of `qat train` end to end, with `--shard` where there are several chips."""
    memory: int
    """Bytes that a chip has."""


def forward_operations(sizes: ModelSizes, seq_len: int) -> float:
    """Return the operations of a token on its way through a model, without the head."""
    return 2 * sizes.linears + 2 * sizes.queries * seq_len * sizes.num_layers


def predict_hours(
    sizes: ModelSizes, there: Situation, num_tokens: float, mfu: float
) -> dict[str, Forecast]:
    """Return what training on so many tokens takes, by accelerator.

    Args:
        sizes: Of the model.
        there: Batch and length; dtype, chips and memory are the accelerator's.
        num_tokens: Of the training text, all passes together.
        mfu: Share of the peak that is reached.
    """
    body, head = forward_operations(sizes, there.seq_len), 2 * sizes.hidden * sizes.vocab
    operations = {
        "pretrain_hours": 3 * (body + head),
        "distil_hours": 3 * (body + head) + head,
        "cache_hours": body,
    }
    found = {}
    for name, device in ACCELERATORS.items():
        rate = mfu * device.peak * device.chips * SECONDS_PER_HOUR
        on_it = replace(
            there,
            dtype=device.dtype,
            num_processes=device.chips,
            is_split=device.chips > 1,
            total_bytes=int(device.memory),
            has_process=False,
            keeps_states=False,
        )
        found[name] = Forecast(
            **{key: num_tokens * count / rate for key, count in operations.items()},
            pretrain_bytes=round(pretraining_bytes(sizes, on_it)),
            distil_bytes=round(training_bytes(sizes, on_it)),
            memory=int(device.memory),
        )
    return found
