"""How far a student is from its teacher, on held-out positions.

    kl_nats        mean over positions of KL(teacher || student) on the whole vocabulary
    kl_nats_lower  the same from a teacher that is known on some tokens only: top-k with the rest
                   as one more cell is a lower bound, sampled and conditional are estimates

One of them is null. Logits of both sides are formed for a chunk of positions at a time.

Shape legend: B batch, L tokens of a block, P positions of it that a teacher is known on (L, or
L - 1 where it ends at the last predicted token), H hidden, V vocabulary, N = B * P.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.distill.kl import forward_kl, kd_loss
from qat.distill.teacher import TeacherSignal, dense_signal
from qat.model.head import hidden_states, logits_of
from qat.runtime import distributed

# Of one side's float32 logits at a time: 256 positions of 49,152 tokens, 48 of 262,144.
CHUNK_BYTES = 48 * 2**20
# As `llama-perplexity --kl-divergence` of llama.cpp reports them, linearly interpolated.
QUANTILES = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p95": 0.95, "kl_p99": 0.99, "kl_p999": 0.999}
Numbers = dict[str, float | int | None]


@dataclass(frozen=True, slots=True)
class LazyTeacher:
    """A teacher known on the whole vocabulary, whose logits are formed when they are compared."""

    mask: Tensor
    """(B, P) bool; True = the position counts."""
    logits: Callable[[slice], Tensor] | None = None
    """Of a run of n of the B * P positions, (n, V). None = no teacher: perplexity alone."""

    def chunks(self, size: int) -> Iterator[tuple[slice, TeacherSignal | None]]:
        """Return each run of `size` positions and the teacher on it."""
        mask = self.mask.flatten()
        for start in range(0, len(mask), size):
            rows = slice(start, start + size)
            is_known = self.logits is not None
            yield rows, dense_signal(self.logits(rows), mask[rows]) if is_known else None


def live_teacher(
    model: nn.Module, token_ids: Tensor, mask: Tensor, document_ids: Tensor | None = None
) -> LazyTeacher:
    """Return a loaded teacher on a batch (B, L), of which the mask (B, P) counts positions."""
    hidden = hidden_states(model, token_ids, document_ids)[:, : mask.shape[1]].flatten(0, 1)
    return LazyTeacher(mask, lambda rows: logits_of(model, hidden[rows]))


Block = tuple[Tensor, TeacherSignal | LazyTeacher]


@dataclass(slots=True)
class Tally:
    """What counted positions have summed up to."""

    kind: str | None = None
    """Of the teacher's signal, see `TeacherSignal.kind`; None where there is no teacher."""
    kl: list[Tensor] = field(default_factory=list)
    """Each counted position's, (n,) float32 a batch, on the host."""
    sums: list[Tensor] = field(default_factory=list)
    """A batch's sums over each sequence, (6, B) float64: kl, kd_loss, agreement, positions, the
    labels' nats, labels."""


@torch.no_grad()
def evaluate_batches(
    model: nn.Module,
    batches: Iterable[Block | tuple[*Block, Tensor]],
    *,
    description: str,
    chunk_tokens: int | None = None,
    kd_sequences: int | None = None,
    is_shared: bool = False,
) -> Numbers:
    """Return the student's distance from the teacher over batches.

    Args:
        model: Causal LM in eval mode.
        batches: Token ids (B, L), the teacher on the first P positions, and optionally document ids
            (B, L) as `hidden_states` takes them, all on the model's device.
        description: Of the progress bar.
        chunk_tokens: Positions whose logits are held at a time; does not change the result. None
            takes as many as `CHUNK_BYTES` hold.
        kd_sequences: The first so many count for kd_loss; all when not given.
        is_shared: Whether `batches` are what `distributed.share` gives this process of all: the
            numbers are then of all, to the bit those of one process.

    Returns:
        kl_nats or kl_nats_lower (the other is None), of the same positions kl_stderr (over
        sequences), kl_median to kl_p999 and kl_max; kd_loss; top1_agreement; perplexity with its
        standard error; tokens, how many positions counted.
    """
    tally = Tally()
    for token_ids, teacher, *documents in tqdm(
        batches, desc=description, unit="batch", leave=False
    ):
        shape = teacher.mask.shape
        hidden = hidden_states(model, token_ids, *documents)[:, : shape[1]].flatten(0, 1)
        labels = token_ids.roll(-1, dims=1)[:, : shape[1]].flatten()
        chunks = teacher.flatten() if isinstance(teacher, TeacherSignal) else teacher
        size = chunk_tokens or positions_of_a_chunk(model, hidden)
        parts = []
        for rows, signal in chunks.chunks(size):
            tally.kind = None if signal is None else signal.kind
            parts.append(compare(logits_of(model, hidden[rows]).float(), labels[rows], signal))
        add(tally, torch.cat(parts, dim=1).view(-1, *shape), teacher.mask, token_ids.shape[1])
    return summary(merged(distributed.gathered(tally)) if is_shared else tally, kd_sequences)


def merged(parts: list[Tally]) -> Tally:
    """Return the tally of one process over all batches, of which each part has every so many-th."""

    def in_order(shares: list[list[Tensor]]) -> list[Tensor]:
        turns = zip_longest(*shares)
        return [found for turn in turns for found in turn if found is not None]

    return Tally(
        kind=parts[0].kind,
        kl=in_order([part.kl for part in parts]),
        sums=in_order([part.sums for part in parts]),
    )


def positions_of_a_chunk(model: nn.Module, hidden: Tensor) -> int:
    """Return how many positions' logits fit a chunk."""
    head = model.get_output_embeddings()
    width = getattr(head, "out_features", hidden.shape[-1])  # a runtime's logits come as hidden
    return max(1, CHUNK_BYTES // (4 * width))


def compare(logits: Tensor, labels: Tensor, signal: TeacherSignal | None) -> Tensor:
    """Return the labels' nats, KL, kd loss and agreement at each position, (4, N).

    The student's logits are (N, V) float32, the labels the tokens that came, (N,). Without a signal
    its three rows are zero.
    """
    nll = nn.functional.cross_entropy(logits, labels, reduction="none")
    if signal is None:
        return torch.stack([nll, *[torch.zeros_like(nll)] * 3])
    best = signal.log_probs.argmax(-1, keepdim=True)  # (N, 1)
    if signal.token_ids is not None:
        best = signal.token_ids.gather(-1, best)
    agree = logits.argmax(-1) == best.squeeze(-1)
    return torch.stack([nll, forward_kl(logits, signal), kd_loss(logits, signal), agree.float()])


def add(tally: Tally, measured: Tensor, mask: Tensor, num_tokens: int) -> None:
    """Add what a batch measured, (4, B, P), where its mask (B, P) counts.

    The last of a block's `num_tokens` positions has no label.
    """
    # One look at the device a batch.
    nll, kl, kd, agree, counts = torch.cat([measured, mask[None].float()]).cpu()
    has_label = counts * (torch.arange(counts.shape[1]) < num_tokens - 1)
    rows = (kl * counts, kd * counts, agree * counts, counts, nll * has_label, has_label)
    tally.sums.append(torch.stack(rows).double().sum(-1))
    tally.kl.append(kl[counts.bool()])


def summary(tally: Tally, kd_sequences: int | None = None) -> Numbers:
    """Return the means of a tally; None where nothing counted or there is no teacher."""
    kl, kd, agree, counts, nll, labels = torch.cat(
        [torch.zeros(6, 0, dtype=torch.float64), *tally.sums], dim=1
    )
    names = ("kl_nats", "kl_nats_lower", "kl_stderr", *QUANTILES, "kl_max")
    values: Numbers = dict.fromkeys((*names, "kd_loss", "top1_agreement"))
    tokens = int(counts.sum())
    if tokens and tally.kind is not None:
        mean, stderr = mean_and_stderr(kl, counts)
        each = torch.cat(tally.kl).numpy()
        quantiles = np.quantile(each, list(QUANTILES.values())).tolist()
        values |= {
            "kl_nats" if tally.kind == "dense" else "kl_nats_lower": mean,
            "kl_stderr": stderr,
            **dict(zip(QUANTILES, quantiles, strict=True)),
            "kl_max": float(each.max()),
            "kd_loss": float(kd[:kd_sequences].sum() / counts[:kd_sequences].sum().clamp_min(1)),
            "top1_agreement": float(agree.sum()) / tokens,
        }
    perplexity, stderr = perplexity_of(nll, labels)
    return {**values, "perplexity": perplexity, "perplexity_stderr": stderr, "tokens": tokens}


def perplexity_of(nll: Tensor, counts: Tensor) -> tuple[float | None, float | None]:
    """Return perplexity and its standard error, from each sequence's nats and number of tokens."""
    mean, stderr = mean_and_stderr(nll, counts)
    if mean is None:
        return None, None
    perplexity = math.exp(min(mean, 700.0))  # what a float holds
    return perplexity, None if stderr is None else perplexity * stderr


def mean_and_stderr(sums: Tensor, counts: Tensor) -> tuple[float | None, float | None]:
    """Return the mean of a number over tokens and its standard error.

    Tokens of a sequence depend on each other, so sequences are the independent draws: the error
    of the ratio sum / count follows from its residuals (delta method).

    Args:
        sums: Of the number over each sequence's tokens, (N,) float64.
        counts: Tokens of each sequence, (N,).
    """
    total = float(counts.sum())
    if not total:
        return None, None
    mean = float(sums.sum()) / total
    if len(sums) < 2:
        return mean, None
    variance = float((sums - mean * counts).square().sum()) * len(sums) / (len(sums) - 1)
    return mean, math.sqrt(variance) / total
