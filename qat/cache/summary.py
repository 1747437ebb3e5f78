"""What a cache holds, in numbers and one picture: bytes by field, tail mass, counted tokens.

Shape legend: N sequences looked at, T positions of each, K top-k.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from qat.cache.codec import Fields
from qat.cache.read import TeacherCache
from qat.distill.teacher import TeacherSignal

SEQUENCES_A_CALL = 16
OF_IDENTITY = ("content", "thinking", "seq_len", "top_k")
OF_IDENTITY += ("block_start", "block_start_id", "documents")
QUANTILES = (0.1, 0.5, 0.9, 0.99)
TOP_SHOWN = 5
DENSE_TOP_K = 64  # of full logits, the tail is what lies outside so many ids


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSummary:
    """What a cache holds."""

    content: str
    """What it keeps of each position."""
    fingerprint: str
    """16 hex digits that name the cache."""
    teacher: str | None
    data: str | None
    thinking: str | None
    vocab_size: int | None
    """Width of the teacher's logits."""
    seq_len: int
    block_start: str
    """bos: every block starts with BOS; none: it starts with text."""
    block_start_id: int | None
    """Token id of BOS."""
    documents: str
    """separate: documents in one block do not attend to each other; joined: they do."""
    top_k: int
    sequences: int
    heldout_sequences: int
    shards: int
    tokens: int
    bytes_per_token: float
    bytes_per_token_by_field: dict[str, float]
    head_bytes: int
    counted_ratio: float
    """Share of the predicted tokens that count."""
    tail_mass: dict[str, float] | None
    """Outside the exact ids; None where the content does not say."""


def summarize_cache(cache: TeacherCache, *, num_sequences: int = 1024) -> CacheSummary:
    """Return what a cache holds, by a look at `num_sequences` spread over it.

    Their shards are checked on the way.
    """
    manifest, identity = cache.manifest, cache.manifest.identity
    counted, tails = [], []
    for fields, signal in sampled_batches(cache, num_sequences):
        counted.append(fields["loss_mask"][:, 1:].float().mean().item())
        tails.append(tail_mass(signal))
    return CacheSummary(
        **{name: getattr(identity, name) for name in OF_IDENTITY},
        fingerprint=manifest.fingerprint,
        teacher=manifest.teacher_name,
        data=manifest.data_name,
        vocab_size=manifest.vocab_size,
        sequences=manifest.num_sequences,
        heldout_sequences=manifest.num_heldout,
        shards=len(manifest.shards),
        tokens=manifest.num_tokens,
        bytes_per_token=manifest.bytes_per_token,
        bytes_per_token_by_field=bytes_by_field(cache),
        head_bytes=manifest.head_bytes,
        counted_ratio=float(np.mean(counted)),
        tail_mass=describe(torch.cat(tails)) if tails[0] is not None else None,
    )


def sampled_batches(
    cache: TeacherCache, num_sequences: int
) -> Iterator[tuple[Fields, TeacherSignal]]:
    """Yield fields and signals of sequences spread evenly over the cache."""
    count = min(num_sequences, cache.num_sequences)
    chosen = np.linspace(0, cache.num_sequences - 1, count).astype(np.int64)
    calls = -(-count // SEQUENCES_A_CALL)
    for rows in tqdm(np.array_split(chosen, calls), desc="read", leave=False):
        yield cache.fields(rows), cache.batch(rows).signal


def tail_mass(signal: TeacherSignal) -> Tensor | None:
    """Return the teacher's mass outside the exact ids at each position, (N * T,).

    None where it is not known. Of full logits it is the mass outside the 64 likeliest ids.
    """
    if signal.kind == "conditional":
        return None
    if signal.kind == "top-k":
        return signal.log_tail.exp().flatten()
    if signal.kind == "dense":
        kept = signal.log_probs.topk(min(DENSE_TOP_K, signal.log_probs.shape[-1]), dim=-1).values
        return (1 - kept.exp().sum(dim=-1)).clamp_min(0).flatten()
    # Exact ids weigh what they are likely to; draws share what is left.
    is_exact = (signal.weights - signal.log_probs.exp()).abs() < 1e-6
    return (1 - (signal.weights * is_exact).sum(dim=-1)).clamp_min(0).flatten()


def describe(values: Tensor) -> dict[str, float]:
    """Return mean, quantiles and largest value."""
    quantiles = np.quantile(values.numpy(), QUANTILES)
    named = {
        f"p{round(100 * share)}": float(value)
        for share, value in zip(QUANTILES, quantiles, strict=True)
    }
    return {"mean": values.mean().item(), **named, "max": values.max().item()}


def bytes_by_field(cache: TeacherCache) -> dict[str, float]:
    """Return the bytes a token that each stored field takes."""
    num_tokens = cache.manifest.shards[0].num_sequences * cache.seq_len
    stored = sorted(cache.stored_bytes().items())
    return {name: num_bytes / num_tokens for name, num_bytes in stored}


def top_tokens(cache: TeacherCache, sequence_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a sequence's ids (L,), the teacher's top ids (T, 5) and their probabilities (T, 5)."""
    batch = cache.batch([sequence_id])
    signal = batch.signal
    log_probs, places = signal.log_probs[0].topk(min(TOP_SHOWN, signal.log_probs.shape[-1]))
    token_ids = places if signal.token_ids is None else signal.token_ids[0].gather(-1, places)
    return batch.input_ids[0], token_ids, log_probs.exp()


def plot_cache(cache: TeacherCache, path: Path, *, num_sequences: int = 256) -> None:
    """Draw tail mass, the share of the likeliest ids, and bytes by field into an image file."""
    from matplotlib.figure import Figure

    signals = [signal for _, signal in sampled_batches(cache, num_sequences)]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    tail_axes, rank_axes, bytes_axes = figure.subplots(1, 3)
    tails = [tail_mass(signal) for signal in signals]
    if tails[0] is not None:
        tail_axes.hist(torch.cat(tails).clamp_min(1e-7).log10().numpy(), bins=60)
    tail_axes.set(title="mass outside the exact ids", xlabel="log10 of mass", ylabel="positions")
    log_probs = torch.cat([signal.log_probs.flatten(0, 1) for signal in signals])
    ranked = log_probs.sort(dim=-1, descending=True).values[:, :DENSE_TOP_K].exp().mean(dim=0)
    ranks = np.arange(1, len(ranked) + 1)
    rank_axes.loglog(ranks, ranked.numpy(), marker=".")
    rank_axes.set(title="mean probability by rank", xlabel="rank", ylabel="probability")
    by_field = bytes_by_field(cache)
    bytes_axes.barh(list(by_field), list(by_field.values()))
    bytes_axes.set(title="bytes a token", xlabel="bytes")
    figure.suptitle(cache.folder.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
