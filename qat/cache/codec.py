"""The teacher's word on a position as bytes: one pair of functions for each content.

    top-k    ids, their log-probabilities, log of the mass outside them
    sampled  the same for few ids, then draws from the rest; with M draws of mass `tail`,
             E_p[f] = sum_k p_k f(k) + tail / M * sum_m f(draw_m) has no bias
    hidden   h ~ scale * int8; logits = head(h)

`pack_*` turn logits or hidden states into fields, `unpack` turns fields into a TeacherSignal.
Log-probabilities are kept in float16, an error below 0.4% of a probability; reading normalizes
them again, so that a KL on them is never negative and a perfect student reaches zero.

Shape legend: B blocks, T positions, V vocabulary, K exact ids, M draws, R negatives, H width,
G groups of S neighbouring ids (V = G * S).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qat.distill.teacher import TeacherSignal, dense_signal, log_rest

Fields = dict[str, Tensor]
LARGEST_GROUP = 64
SMALLEST_GROUP = 8  # below it the two-step search saves nothing
CHUNK_TOKENS = 256  # float32 logits of so many positions at a time; bounds memory
LOWEST_LOG_PROB = -80.0  # e^-80 is zero beside any other mass; infinity would poison a mean
INT8_LARGEST = 127


def pack_top_k(logits: Tensor, top_k: int) -> Fields:
    """Return the fields of `top-k`.

    Args:
        logits: (B, T, V), any float dtype.
        top_k: K, at most V.

    Returns:
        token_ids (B, T, K) int64 by falling probability; log_probs (B, T, K) float16;
        log_tail (B, T) float16.
    """
    return pack_chunks(logits, lambda part, _: exact_fields(part, top_k)[0])


def pack_sampled(logits: Tensor, top_k: int, offsets: Tensor, num_draws: int) -> Fields:
    """Return the fields of `sampled`.

    Draws are systematic: one offset sets `num_draws` points at equal distance in the tail's
    cumulated mass. Each draw alone follows the tail, so the estimate has no bias, and together
    they spread better than independent ones.

    Args:
        logits: (B, T, V), any float dtype.
        top_k: K, ids kept exactly.
        offsets: (B, T) float32 in [0, 1).
        num_draws: M.

    Returns:
        The fields of `top-k`, draw_ids (B, T, M) int64 and draw_log_probs (B, T, M) float16.
    """

    def pack(part: Tensor, offset: Tensor) -> Fields:
        kept, log_probs = exact_fields(part, top_k)
        tail = log_probs.exp().scatter_(-1, kept["token_ids"], 0.0)
        draw_ids = draw_systematic(tail, offset, num_draws)
        draw_log_probs = log_probs.gather(-1, draw_ids).clamp_min(LOWEST_LOG_PROB)
        return {**kept, "draw_ids": draw_ids, "draw_log_probs": draw_log_probs.half()}

    return pack_chunks(logits, pack, offsets)


def pack_negatives(logits: Tensor, negative_ids: Tensor) -> Fields:
    """Return given ids with their log-probabilities.

    Args:
        logits: (B, T, V), any float dtype.
        negative_ids: (B, T, R) int64.
    """

    def pack(part: Tensor, ids: Tensor) -> Fields:
        log_partition = part.float().logsumexp(dim=-1, keepdim=True)
        return {"negative_log_probs": (part.gather(-1, ids).float() - log_partition).half()}

    return {"negative_ids": negative_ids, **pack_chunks(logits, pack, negative_ids)}


def pack_hidden(hidden: Tensor) -> Fields:
    """Return the fields of `hidden`: one scale a position.

    Args:
        hidden: (B, T, H) final hidden states, as the head takes them.

    Returns:
        hidden (B, T, H) int8 and hidden_scale (B, T) float32.
    """
    hidden = hidden.float()
    scale = hidden.abs().amax(dim=-1, keepdim=True) / INT8_LARGEST
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return {"hidden": (hidden / scale).round().to(torch.int8), "hidden_scale": scale[..., 0]}


def unpack(fields: Fields, mask: Tensor, head: Callable[[Tensor], Tensor] | None) -> TeacherSignal:
    """Return the signal that fields hold.

    Args:
        fields: Of any content, (B, T, ...).
        mask: (B, T) bool.
        head: From hidden states to logits, for `hidden`.
    """
    if "hidden" in fields:
        hidden = fields["hidden"].float() * fields["hidden_scale"].unsqueeze(-1)
        return dense_signal(head(hidden), mask)
    if "logits" in fields:
        return unpack_conditional(fields, mask)
    log_probs, log_tail = normalize(fields["log_probs"].float(), fields["log_tail"].float())
    if "draw_ids" not in fields:
        return TeacherSignal(
            kind="top-k",
            log_probs=log_probs,
            mask=mask,
            token_ids=fields["token_ids"].long(),
            log_tail=log_tail,
        )
    draws = fields["draw_log_probs"].float()
    draw_weights = (log_tail.exp() / draws.shape[-1]).unsqueeze(-1).expand_as(draws)
    return TeacherSignal(
        kind="sampled",
        log_probs=torch.cat([log_probs, draws], dim=-1),
        mask=mask,
        token_ids=torch.cat([fields["token_ids"].long(), fields["draw_ids"].long()], dim=-1),
        weights=torch.cat([log_probs.exp(), draw_weights], dim=-1),
    )


def unpack_conditional(fields: Fields, mask: Tensor) -> TeacherSignal:
    """Return the signal of raw logits on K ids: what lies outside them is not known."""
    return TeacherSignal(
        kind="conditional",
        log_probs=torch.log_softmax(fields["logits"].float(), dim=-1),
        mask=mask,
        token_ids=fields["token_ids"].long(),
    )


def normalize(log_probs: Tensor, log_tail: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities (B, T, K) and tail (B, T) whose masses sum to one."""
    total = torch.cat([log_probs, log_tail.unsqueeze(-1)], dim=-1).logsumexp(-1, keepdim=True)
    return log_probs - total, log_tail - total.squeeze(-1)


def pack_chunks(
    logits: Tensor, pack: Callable[[Tensor, Tensor | None], Fields], beside: Tensor | None = None
) -> Fields:
    """Return `pack` of the logits, a few positions at a time.

    Args:
        logits: (B, T, V).
        pack: From (n, V) logits and the same rows of `beside` to fields (n, ...).
        beside: (B, T, ...), cut like the logits.
    """
    shape = logits.shape[:2]
    rows = logits.flatten(0, 1).split(CHUNK_TOKENS)
    others = [None] * len(rows) if beside is None else beside.flatten(0, 1).split(CHUNK_TOKENS)
    parts = [pack(part, other) for part, other in zip(rows, others, strict=True)]
    return {
        name: torch.cat([part[name] for part in parts]).unflatten(0, shape) for name in parts[0]
    }


def exact_fields(logits: Tensor, top_k: int) -> tuple[Fields, Tensor]:
    """Return the fields of `top-k`, and all log-probabilities.

    Args:
        logits: (n, V), any float dtype.
        top_k: K.
    """
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    kept, token_ids = largest(log_probs, top_k)
    log_tail = log_rest(kept).clamp_min(LOWEST_LOG_PROB)
    kept = kept.clamp_min(LOWEST_LOG_PROB)
    fields = {"token_ids": token_ids, "log_probs": kept.half(), "log_tail": log_tail.half()}
    return fields, log_probs


def largest(values: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the `top_k` largest values of each row and their ids, by falling value.

    The K largest lie in the K groups with the largest maxima, so a search among group maxima
    and one among those groups replace a search of the whole row, which is far slower.

    Args:
        values: (n, V).
        top_k: K, at most V.
    """
    size = group_size(values.shape[-1])
    if size < SMALLEST_GROUP or top_k * size >= values.shape[-1]:
        return values.topk(top_k, dim=-1)
    groups = values.unflatten(-1, (-1, size))  # (n, G, S)
    chosen = groups.amax(dim=-1).topk(top_k, dim=-1, sorted=False).indices  # (n, K)
    inside = groups.gather(1, chosen.unsqueeze(-1).expand(-1, -1, size))  # (n, K, S)
    kept, positions = inside.flatten(1).topk(top_k, dim=-1)
    token_ids = chosen.gather(1, positions // size) * size + positions % size
    return kept, token_ids


def group_size(vocab_size: int) -> int:
    """Return the largest power of two, at most 64, that divides the vocabulary."""
    return min(LARGEST_GROUP, vocab_size & -vocab_size)


def draw_systematic(mass: Tensor, offset: Tensor, num_draws: int) -> Tensor:
    """Return ids at equal distances in the cumulated mass of each row.

    Args:
        mass: (n, V), not negative, float32.
        offset: (n,) in [0, 1).
        num_draws: M.

    Returns:
        (n, M) int64.
    """
    size = group_size(mass.shape[-1])
    groups = mass.unflatten(-1, (-1, size))  # (n, G, S)
    ends = groups.sum(dim=-1).cumsum(dim=-1)  # (n, G)
    steps = torch.arange(num_draws, device=mass.device)
    points = (offset.unsqueeze(-1) + steps) / num_draws * ends[:, -1:]  # (n, M)
    chosen = torch.searchsorted(ends, points, right=True).clamp_max(ends.shape[-1] - 1)
    starts = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], dim=-1).gather(1, chosen)
    inside = groups.gather(1, chosen.unsqueeze(-1).expand(-1, -1, size)).cumsum(dim=-1)  # (n, M, S)
    rest = (points - starts).unsqueeze(-1)
    # Rounding may leave a point behind its group's end; the group's last mass takes it.
    rest = torch.minimum(rest, inside[..., -1:] * (1 - 1e-6))
    positions = torch.searchsorted(inside, rest, right=True).squeeze(-1).clamp_max(size - 1)
    return chosen * size + positions
