"""What the fields of a cache's files must be, checked when a file is first opened.

Shape legend: n sequences of a file, L tokens of a block, T = L - 1, K exact ids, M draws, R
negatives, V vocabulary, H width, G groups of neighbouring channels.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from qat.cache.codec import Fields
from qat.cache.manifest import CacheManifest, CacheMismatch, FileEntry

REMEDY = "fetch the cache again, or remove it and run `qat build-cache` again"
INTEGERS = (torch.uint16, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.float32)
# Name to dtypes and axes; what a letter stands for must be the same in all fields of a file.
FORMS: dict[str, tuple[tuple[torch.dtype, ...], str]] = {
    "input_ids": (INTEGERS, "nL"),
    "document_ids": (INTEGERS, "nL"),
    "loss_mask": ((torch.bool,), "nL"),
    "token_ids": (INTEGERS, "nTK"),
    "log_probs": (FLOATS, "nTK"),
    "log_tail": (FLOATS, "nT"),
    "draw_ids": (INTEGERS, "nTM"),
    "draw_log_probs": (FLOATS, "nTM"),
    "negative_ids": (INTEGERS, "nTR"),
    "negative_log_probs": (FLOATS, "nTR"),
    "negative_logits": (FLOATS, "nTR"),
    "logits": (FLOATS, "nTK"),
    "hidden": ((torch.int8,), "nTH"),
    "hidden_scale": (FLOATS, "nTG"),
}
HEAD_FORMS: dict[str, tuple[tuple[torch.dtype, ...], str]] = {
    "weight": ((*FLOATS, torch.bfloat16), "VH"),
    "channel_scale": (FLOATS, "H"),
    "bias": ((*FLOATS, torch.bfloat16), "V"),
    "factor": (FLOATS, ""),
    "softcap": (FLOATS, ""),
}
CONTENTS = {
    "top-k": ("token_ids", "log_probs", "log_tail"),
    "sampled": ("token_ids", "log_probs", "log_tail", "draw_ids", "draw_log_probs"),
    "hidden": ("hidden", "hidden_scale"),
    "conditional": ("token_ids", "logits"),
}
VOCABULARY_IDS = ("input_ids", "token_ids", "draw_ids", "negative_ids")
LOG_PROBS = ("log_probs", "log_tail", "draw_log_probs", "negative_log_probs")
LARGEST_LOG_PROB = 0.01  # rounding to float16 leaves none above 0; others' rounding may


def check_shard(
    path: Path,
    fields: Fields,
    entry: FileEntry,
    manifest: CacheManifest,
    vocab_size: int | None,
) -> None:
    """Refuse a shard whose fields are not those that its manifest promises.

    `vocab_size` bounds the ids where it is known.

    Raises:
        CacheMismatch: Names file, field, what it holds and what it should.
    """
    identity = manifest.identity
    required = ["input_ids", "loss_mask", *CONTENTS[identity.content]]
    required += ["document_ids"] if identity.documents == "separate" else []
    required += ["negative_ids"] if identity.num_negatives else []
    sizes = {
        "n": entry.num_sequences,
        "L": identity.seq_len,
        "T": identity.seq_len - 1,
        "K": identity.top_k,
        "M": identity.num_draws,
        "R": identity.num_negatives,
    }
    check_forms(path, fields, FORMS, sizes, required)
    if "hidden" in fields and fields["hidden"].shape[-1] % fields["hidden_scale"].shape[-1]:
        raise CacheMismatch(f"{path}: hidden_scale does not divide hidden; {REMEDY}")
    check_values(path, fields, vocab_size)


def check_text(path: Path, fields: Fields, manifest: CacheManifest) -> None:
    """Refuse a file of further text that is not as its manifest promises."""
    sizes = {"n": manifest.text.num_sequences, "L": manifest.identity.seq_len}
    check_forms(path, fields, FORMS, sizes, ("input_ids", "document_ids"))
    if manifest.text.num_sequences:  # the teacher may have read all there is
        check_values(path, fields, manifest.vocab_size)


def check_head(path: Path, fields: Fields, vocab_size: int | None, width: int) -> None:
    """Refuse an output matrix that is not (V, H), or has numbers that are not finite."""
    sizes = {"H": width} | ({} if vocab_size is None else {"V": vocab_size})
    check_forms(path, fields, HEAD_FORMS, sizes, ("weight", "channel_scale"))
    for name, field in fields.items():
        if not torch.isfinite(field).all():
            raise CacheMismatch(f"{path}: {name} holds NaN or infinity; {REMEDY}")


def check_forms(
    path: Path,
    fields: Fields,
    forms: dict[str, tuple[tuple[torch.dtype, ...], str]],
    sizes: dict[str, int],
    required: Iterable[str],
) -> None:
    """Refuse fields that are missing, unknown, of another dtype or shape."""
    absent = [name for name in required if name not in fields]
    if absent or not fields.keys() <= forms.keys():
        what = f"{absent[0]} is missing" if absent else f"{min(fields.keys() - forms)} is unknown"
        raise CacheMismatch(f"{path}: field {what}; {REMEDY}")
    sizes = dict(sizes)
    for name, field in fields.items():
        dtypes, axes = forms[name]
        if field.dtype not in dtypes:
            raise CacheMismatch(f"{path}: {name} is of {field.dtype}, not {dtypes[0]}; {REMEDY}")
        found = dict(zip(axes, field.shape, strict=False))
        expected = [sizes.setdefault(axis, found.get(axis, 0)) for axis in axes]
        if list(field.shape) != expected:
            raise CacheMismatch(
                f"{path}: {name} has shape {tuple(field.shape)}, not {tuple(expected)}; {REMEDY}"
            )


def check_values(path: Path, fields: Fields, vocab_size: int | None) -> None:
    """Refuse ids outside the vocabulary and numbers that are not finite."""
    for name, field in fields.items():
        values = field.numpy()
        if not values.size:
            raise CacheMismatch(f"{path}: {name} is empty; {REMEDY}")
        if name in VOCABULARY_IDS:
            low, high = int(values.min()), int(values.max())
            if low < 0 or (vocab_size is not None and high >= vocab_size):
                raise CacheMismatch(
                    f"{path}: {name} reaches {low} .. {high}, the vocabulary has "
                    f"{vocab_size or 'no such'} ids; {REMEDY}"
                )
        elif field.is_floating_point():
            most = LARGEST_LOG_PROB if name in LOG_PROBS else np.inf
            if not (np.isfinite(values).all() and values.max() <= most):
                raise CacheMismatch(
                    f"{path}: {name} holds NaN, infinity or a probability above 1; {REMEDY}"
                )
