"""How far a student is from its teacher, on held-out positions.

Shape legend: B batch, T positions, H hidden, V vocabulary, N = B * T.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.distill.kl import forward_kl, kd_loss
from qat.distill.objective import CHUNK_TOKENS
from qat.distill.teacher import TeacherSignal
from qat.model.head import hidden_states, logits_of


@dataclass(slots=True)
class Tally:
    """Sums over counted positions; kept per sequence where an error bar is wanted."""

    kl: float = 0.0
    kd: float = 0.0
    agree: float = 0.0
    tokens: int = 0
    nll: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


@torch.no_grad()
def evaluate_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, TeacherSignal]],
    *,
    description: str,
    chunk_tokens: int = CHUNK_TOKENS,
) -> dict[str, float | int | None]:
    """Return the student's distance from the teacher over batches.

    Args:
        model: Causal LM in eval mode.
        batches: Token ids (B, L) and the teacher's word on the first L - 1 positions, on the
            model's device.
        description: Of the progress bar.
        chunk_tokens: Positions whose logits are held at a time; does not change the result.

    Returns:
        kl_nats, kd_loss, perplexity with its standard error, top1_agreement, tokens.
    """
    tally = Tally()
    for token_ids, signal in tqdm(batches, desc=description, unit="batch", leave=False):
        hidden = hidden_states(model, token_ids)[:, :-1].flatten(0, 1)
        labels = token_ids[:, 1:].flatten()
        parts = [
            compare(logits_of(model, hidden[rows]).float(), labels[rows], part)
            for rows, part in signal.flatten().chunks(chunk_tokens)
        ]
        add(tally, torch.cat(parts, dim=1).view(-1, *signal.mask.shape), signal.mask)
    return summary(tally)


def compare(logits: Tensor, labels: Tensor, signal: TeacherSignal) -> Tensor:
    """Return KL, kd loss, agreement and the labels' nats at each position, (4, N).

    Args:
        logits: The student's, (N, V) float32.
        labels: The tokens that came, (N,).
        signal: The teacher on the same positions.
    """
    best = signal.log_probs.argmax(-1, keepdim=True)  # (N, 1)
    if signal.token_ids is not None:
        best = signal.token_ids.gather(-1, best)
    agree = logits.argmax(-1) == best.squeeze(-1)
    nll = nn.functional.cross_entropy(logits, labels, reduction="none")
    return torch.stack([forward_kl(logits, signal), kd_loss(logits, signal), agree.float(), nll])


def add(tally: Tally, measured: Tensor, mask: Tensor) -> None:
    """Add what a batch measured, (4, B, T), where its mask (B, T) counts."""
    kl, kd, agree, nll = measured * mask
    # One look at the device a batch; float32 counts a batch's tokens exactly.
    sums = torch.stack([kl.sum(), kd.sum(), agree.sum()])
    values = torch.cat([sums, nll.sum(1), mask.sum(1).float()]).tolist()
    tally.kl, tally.kd, tally.agree = (
        former + value
        for former, value in zip((tally.kl, tally.kd, tally.agree), values[:3], strict=True)
    )
    num_sequences = len(mask)
    tally.nll += values[3 : 3 + num_sequences]
    counts = [int(count) for count in values[3 + num_sequences :]]
    tally.counts += counts
    tally.tokens += sum(counts)


def summary(tally: Tally) -> dict[str, float | int | None]:
    """Return the means of a tally; None where nothing counted."""
    if not tally.tokens:
        names = ("kl_nats", "kd_loss", "perplexity", "perplexity_stderr", "top1_agreement")
        return {**dict.fromkeys(names), "tokens": 0}
    perplexity, stderr = perplexity_of(tally.nll, tally.counts)
    return {
        "kl_nats": tally.kl / tally.tokens,
        "kd_loss": tally.kd / tally.tokens,
        "perplexity": perplexity,
        "perplexity_stderr": stderr,
        "top1_agreement": tally.agree / tally.tokens,
        "tokens": tally.tokens,
    }


def perplexity_of(nll: list[float], counts: list[int]) -> tuple[float, float | None]:
    """Return perplexity and its standard error from per-sequence sums of nats and token counts.

    Tokens of a sequence depend on each other, so sequences are the independent draws: the error
    of the ratio sum nll / sum counts follows from its residuals (delta method), and perplexity's
    from exp.
    """
    total = sum(counts)
    mean = sum(nll) / total
    perplexity = math.exp(min(mean, 700.0))
    if len(nll) < 2:
        return perplexity, None
    residuals = [n - mean * c for n, c in zip(nll, counts, strict=True)]
    variance = sum(r * r for r in residuals) * len(nll) / (len(nll) - 1)
    return perplexity, perplexity * math.sqrt(variance) / total
