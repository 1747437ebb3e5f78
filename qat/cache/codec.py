"""The teacher's signal at a position as bytes: one pair of functions for each content.

    top-k    ids, their log-probabilities, log of the mass outside them
    sampled  the same for few ids, then draws from the rest; with M draws of mass `tail`,
             E_p[f] = sum_k p_k f(k) + tail / M * sum_m f(draw_m) has no bias
    hidden   h ~ channel_scale * scale * int8; logits = head(h)

`pack_*` turn logits or hidden states into fields, `unpack` turns fields into a TeacherSignal.
Log-probabilities are kept in float16, an error below 0.4% of a probability; reading normalizes
them again, so that a KL on them is never negative and a perfect student reaches zero.

Shape legend: B blocks, T positions, V vocabulary, K exact ids, M draws, R negatives, H width,
G groups of S neighbouring ids (V = G * S).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qat.distill.teacher import TeacherSignal, log_rest

Fields = dict[str, Tensor]
LARGEST_GROUP = 64
SMALLEST_GROUP = 8  # below it the two-step search saves nothing
# Float32 logits held at a time; on a CPU they stay in its last cache.
CHUNK_BYTES_CPU = 3_200_000
CHUNK_BYTES = 2**29
LOWEST_LOG_PROB = -80.0  # e^-80 is zero next to any other mass; infinity would poison a mean
INT8_LARGEST = 127
SMALLEST_SCALE = 6.2e-5  # about float16's smallest normal number


def pack_top_k(logits: Tensor, top_k: int) -> Fields:
    """Return the fields of `top-k`, of logits (B, T, V) of any float dtype, K at most V.

    token_ids (B, T, K) int64 by falling probability, log_probs (B, T, K) float16, log_tail (B, T)
    float16.
    """

    def pack(part: Tensor, _: None) -> Fields:
        _, token_ids = largest(part, top_k)
        log_probs = torch.log_softmax(part, dim=-1, dtype=torch.float32).gather(-1, token_ids)
        log_tail = as_half(log_rest(log_probs))
        return {"token_ids": token_ids, "log_probs": as_half(log_probs), "log_tail": log_tail}

    return pack_chunks(logits, pack)


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
        values = part.float()
        kept, token_ids = largest(part, top_k)
        mass = (values - kept[:, :1]).exp_()  # (n, V), the likeliest id has 1
        kept_mass = mass.gather(-1, token_ids).sum(dim=-1, keepdim=True)
        draw_ids, tail_mass = draw_systematic(mass.scatter_(-1, token_ids, 0), offset, num_draws)
        log_partition = kept[:, :1] + (kept_mass + tail_mass).log()
        log_tail = tail_mass.log() - (kept_mass + tail_mass).log()
        return {
            "token_ids": token_ids,
            "log_probs": as_half(kept - log_partition),
            "log_tail": as_half(log_tail.squeeze(-1)),
            "draw_ids": draw_ids,
            "draw_log_probs": as_half(values.gather(-1, draw_ids) - log_partition),
        }

    return pack_chunks(logits, pack, offsets)


def pack_negatives(logits: Tensor, negative_ids: Tensor) -> Fields:
    """Return given ids, (B, T, R) int64, with their log-probabilities in logits (B, T, V)."""

    def pack(part: Tensor, ids: Tensor) -> Fields:
        log_partition = part.float().logsumexp(dim=-1, keepdim=True)
        return {"negative_log_probs": as_half(part.gather(-1, ids).float() - log_partition)}

    return {"negative_ids": negative_ids, **pack_chunks(logits, pack, negative_ids)}


def pack_hidden(hidden: Tensor, channel_scale: Tensor) -> Fields:
    """Return the fields of `hidden`: one scale for each group of S neighbouring channels.

    Final hidden states (B, T, H), as the head takes them, with the usual size of each channel (H,)
    become hidden (B, T, H) int8 and hidden_scale (B, T, H / S) float16.
    """
    usual = hidden.float() / channel_scale
    groups = usual.unflatten(-1, (-1, group_size(hidden.shape[-1])))  # (B, T, G, S)
    scale = (groups.abs().amax(dim=-1) / INT8_LARGEST).clamp_min(SMALLEST_SCALE).half()
    indices = (groups / scale.float().unsqueeze(-1)).round().clamp(-INT8_LARGEST, INT8_LARGEST)
    return {"hidden": indices.flatten(-2).to(torch.int8), "hidden_scale": scale}


def unpack_hidden(fields: Fields, channel_scale: Tensor) -> Tensor:
    """Return hidden states, (B, T, H) float32."""
    groups = fields["hidden"].float().unflatten(-1, (fields["hidden_scale"].shape[-1], -1))
    return (groups * fields["hidden_scale"].float().unsqueeze(-1)).flatten(-2) * channel_scale


def usual_size(hidden: Tensor) -> Tensor:
    """Return each channel's size for `pack_hidden`, (H,) float32.

    The last norm of a language model leaves a few channels tens of times larger than the rest;
    one scale for all would round the rest away: on SmolLM2-135M a KL of 0.012 nats between the
    states and their copy, against 0.0004 with channels and groups of 64 (the teacher's own
    bf16 costs 0.0015).
    """
    hidden = hidden.float().flatten(0, -2)
    typical, largest_seen = hidden.square().mean(dim=0).sqrt(), hidden.abs().amax(dim=0)
    return (typical * largest_seen).sqrt().clamp_min(SMALLEST_SCALE)


def unpack(fields: Fields, mask: Tensor) -> TeacherSignal:
    """Return the signal that fields (B, T, ...) of any content but `hidden` hold; mask (B, T)."""
    if "logits" in fields:  # raw, on K ids: what lies outside them is not known
        return TeacherSignal(
            kind="conditional",
            log_probs=torch.log_softmax(fields["logits"].float(), dim=-1),
            mask=mask,
            token_ids=fields["token_ids"].long(),
        )
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


def normalize(log_probs: Tensor, log_tail: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities (B, T, K) and tail (B, T) whose masses sum to one."""
    total = torch.cat([log_probs, log_tail.unsqueeze(-1)], dim=-1).logsumexp(-1, keepdim=True)
    return log_probs - total, log_tail - total.squeeze(-1)


def pack_chunks(
    logits: Tensor, pack: Callable[[Tensor, Tensor | None], Fields], other: Tensor | None = None
) -> Fields:
    """Return `pack` of the logits, a few positions at a time.

    Args:
        logits: (B, T, V).
        pack: From (n, V) logits and the same rows of `other` to fields (n, ...).
        other: (B, T, ...), cut like the logits.
    """
    shape = logits.shape[:2]
    num_bytes = CHUNK_BYTES_CPU if logits.device.type == "cpu" else CHUNK_BYTES
    size = max(1, num_bytes // (4 * logits.shape[-1]))
    rows = logits.flatten(0, 1).split(size)
    others = [None] * len(rows) if other is None else other.flatten(0, 1).split(size)
    parts = [pack(part, other) for part, other in zip(rows, others, strict=True)]
    return {
        name: torch.cat([part[name] for part in parts]).unflatten(0, shape) for name in parts[0]
    }


def as_half(log_probs: Tensor) -> Tensor:
    """Return log-probabilities in float16, none of them infinite."""
    return log_probs.clamp_min(LOWEST_LOG_PROB).half()


def largest(values: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the `top_k` largest values of each row and their ids, by falling value.

    The K largest lie in the K groups with the largest maxima, so a search among group maxima
    and one among those groups replace a search of the whole row, which is far slower. A group is
    every G-th id, and maxima are taken in the logits' own dtype: whole vectors of both at a time.

    Args:
        values: (n, V), any float dtype.
        top_k: K, at most V.

    Returns:
        (n, K) float32 and (n, K) int64.
    """
    size = group_size(values.shape[-1])
    if size < SMALLEST_GROUP or top_k * size >= values.shape[-1]:
        return values.float().topk(top_k, dim=-1)
    groups = values.unflatten(-1, (size, -1))  # (n, S, G)
    chosen = groups.amax(dim=1).float().topk(top_k, dim=-1, sorted=False).indices  # (n, K)
    inside = groups.gather(2, chosen.unsqueeze(1).expand(-1, size, -1))  # (n, S, K)
    kept, positions = inside.flatten(1).float().topk(top_k, dim=-1)
    token_ids = positions // top_k * groups.shape[-1] + chosen.gather(1, positions % top_k)
    return kept, token_ids


def group_size(vocab_size: int) -> int:
    """Return the largest power of two, at most 64, that divides the vocabulary."""
    return min(LARGEST_GROUP, vocab_size & -vocab_size)


def draw_systematic(mass: Tensor, offset: Tensor, num_draws: int) -> tuple[Tensor, Tensor]:
    """Return ids (n, M) at equal distances in the cumulated mass of each row, and the mass (n, 1).

    Mass (n, V) is float32 and not negative, offsets (n,) are in [0, 1).
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
    return chosen * size + positions, ends[:, -1:]
