"""Writing a cache: the teacher's forward, a shard at a time, resumable after any kill.

A shard appears under its name only when whole and the manifest comes last. What was whole
before a kill is kept, the rest is made again from the same batches, so an interrupted build ends
in the same bytes as an uninterrupted one. Several processes make shards of their own each.

Shape legend: n sequences of a shard, B batch, L tokens of a block, T = L - 1, V vocabulary.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.cache import codec, shard
from qat.cache import manifest as manifests
from qat.cache.read import TeacherCache
from qat.data.blocks import Blocks, set_aside
from qat.model.head import hidden_states, logit_scaling, logits_of
from qat.runtime.device import Device
from qat.runtime.distributed import from_first, gathered, share
from qat.runtime.launch import is_first
from qat.storage.files import atomic_folder, folder_lock, sweep_leftovers, write_json

HEAD_FILE = "head.safetensors"
TEXT_FILE = "text.safetensors"
SHARDS_IN_FLIGHT = 2  # being copied and written while the next one is computed
BARE_BATCHES = 3  # timed before and after the build
SCALE_TOKENS = 4096  # of the first blocks: enough for each channel's usual size
Forward = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class BuildRates:
    """Speed of a build; None where nothing was left to do."""

    tokens_per_second: float | None
    bare_forward_tokens_per_second: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every step of one build reads."""

    forward: Forward
    """Token and document ids (B, T) to logits (B, T, V), or to hidden states (B, T, H)."""
    blocks: Blocks
    identity: manifests.CacheIdentity
    id_dtype: type[np.integer]
    folder: Path
    batch_size: int
    device: Device
    channel_scale: Tensor | None = None
    """(H,), for hidden content."""


def find_built(folder: Path, identity: manifests.CacheIdentity) -> manifests.CacheManifest | None:
    """Return the manifest of a whole cache of this identity, None where there is none yet."""
    if (folder / manifests.MANIFEST_FILE).is_file():
        manifest = manifests.read_manifest(folder)
        manifests.require_identity(manifest.identity, identity, folder)
        (folder / manifests.BUILDING_FILE).unlink(missing_ok=True)
        return manifest
    if (folder / manifests.BUILDING_FILE).is_file():
        manifests.require_identity(
            manifests.read_identity(folder / manifests.BUILDING_FILE), identity, folder
        )
    return None


def write_cache(
    teacher: nn.Module,
    blocks: Blocks,
    identity: manifests.CacheIdentity,
    folder: Path,
    *,
    teacher_name: str,
    data_name: str,
    batch_size: int,
    device: Device,
) -> tuple[manifests.CacheManifest, BuildRates]:
    """Write the teacher's signal on blocks; continue where an earlier call was cut short.

    The teacher is frozen and on the device. A batch has `batch_size` blocks at most; the last one
    of a shard is padded to it. Of blocks beyond the identity's `max_sequences` ids alone are kept.
    """
    vocab_size = teacher.get_output_embeddings().weight.shape[0]
    if identity.top_k > vocab_size:
        raise ValueError(
            f"--top-k {identity.top_k} exceeds the vocabulary, {vocab_size}; give less"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder) if is_first() else nullcontext():
        if built := from_first(partial(start_build, folder, identity)):
            return built, BuildRates(None, None)
        blocks, text = split_text(blocks, identity)
        job = Job(
            forward=teacher_forward(teacher, identity.content),
            blocks=blocks,
            identity=identity,
            id_dtype=shard.id_dtype(vocab_size),
            folder=folder,
            batch_size=min(batch_size, len(blocks), shard.sequences_a_shard(identity.seq_len)),
            device=device,
        )
        if identity.content == "hidden":
            channel_scale = from_first(lambda: prepare_head(teacher, job).cpu())
            job = replace(job, channel_scale=channel_scale.to(device.torch_device))
        shards, rates = write_shards(job)

        def finish() -> manifests.CacheManifest:
            is_hidden = job.channel_scale is not None
            manifest = manifests.CacheManifest(
                identity=identity,
                teacher_name=teacher_name,
                data_name=data_name,
                vocab_size=vocab_size,
                num_sequences=len(blocks),
                num_heldout=blocks.num_heldout,
                shards=shards,
                head=shard.entry_of_file(folder / HEAD_FILE, 0) if is_hidden else None,
                text=None if text is None else write_text(job, text),
            )
            manifests.write_manifest(folder, manifest)
            (folder / manifests.BUILDING_FILE).unlink()
            return manifest

        return from_first(finish), rates


def start_build(folder: Path, identity: manifests.CacheIdentity) -> manifests.CacheManifest | None:
    """Claim a folder for a build; return the manifest where it was complete."""
    if built := find_built(folder, identity):
        return built
    write_json(folder / manifests.BUILDING_FILE, asdict(identity))
    sweep_leftovers(folder)
    return None


def split_text(blocks: Blocks, identity: manifests.CacheIdentity) -> tuple[Blocks, Blocks | None]:
    """Return the blocks that the teacher reads, and those of which ids alone are kept, if any."""
    if not identity.text_sequences:
        return blocks, None
    return set_aside(blocks, max(0, len(blocks) - identity.max_sequences))


def write_text(job: Job, text: Blocks) -> manifests.FileEntry:
    """Write blocks that the teacher does not read; return the entry."""
    fields = {"input_ids": text.token_ids, "document_ids": text.document_ids}
    path = job.folder / TEXT_FILE
    return shard.write_fields(path, fields, ids=job.id_dtype, num_sequences=len(text))


def write_shards(job: Job) -> tuple[tuple[manifests.FileEntry, ...], BuildRates]:
    """Write the shards that are missing; return the entries of all, and the speed.

    Of several processes each writes its share of them; the speed is that of all.
    """
    seq_len = job.identity.seq_len
    ranges = shard.shard_ranges(len(job.blocks), seq_len)
    entries = from_first(lambda: {n: kept_shard(job, n, rows) for n, rows in ranges.items()})
    missing = [index for index, entry in entries.items() if entry is None]
    if not missing:
        return tuple(entries.values()), BuildRates(None, None)
    sample = torch.arange(job.batch_size)
    bare_seconds = time_forward(job, sample)
    start = time.perf_counter()
    made = write_missing(job, {index: ranges[index] for index in share(missing)})
    entries |= {index: entry for part in gathered(made) for index, entry in part.items()}
    seconds = time.perf_counter() - start
    bare_seconds += time_forward(job, sample)
    num_tokens = sum(len(ranges[index]) for index in missing) * seq_len
    bare_tokens = 2 * BARE_BATCHES * job.batch_size * seq_len * len(gathered(None))
    rates = BuildRates(num_tokens / seconds, bare_tokens / bare_seconds)
    return tuple(entries.values()), rates


def write_missing(job: Job, ranges: dict[int, Tensor]) -> dict[int, manifests.FileEntry]:
    """Write the shards of some ranges of sequences; return their entries."""
    num_rows = sum(map(len, ranges.values()))
    with ThreadPoolExecutor(1) as writer, tqdm(total=num_rows, unit="block") as progress:
        futures: list[Future[manifests.FileEntry]] = []
        for index, sequences in ranges.items():
            parts = []
            for rows in sequences.split(job.batch_size):
                parts.append(pack_batch(job, rows))
                progress.update(len(rows))
            if len(futures) >= SHARDS_IN_FLIGHT:
                futures[-SHARDS_IN_FLIGHT].result()
            fields = shard_fields(job, sequences, parts)
            futures.append(writer.submit(write_shard, job, index, fields))
        return {index: future.result() for index, future in zip(ranges, futures, strict=True)}


def default_batch_size(device: Device, seq_len: int) -> int:
    """Return blocks a pass: enough to feed the device, few enough for the logits to fit."""
    num_tokens = 1024 if device.kind == "cpu" else 8192
    return max(1, num_tokens // seq_len)


def teacher_forward(teacher: nn.Module, content: str) -> Forward:
    """Return the function from ids (B, T) to logits (B, T, V), or to hidden states (B, T, H)."""
    hidden = partial(hidden_states, teacher)
    return hidden if content == "hidden" else lambda *ids: logits_of(teacher, hidden(*ids))


def run_teacher(job: Job, rows: Tensor) -> Tensor:
    """Return the teacher's output after each token but the last of some blocks.

    They are padded to the batch size, so that every pass has one shape.
    """
    padded = torch.cat([rows, rows[-1:].expand(job.batch_size - len(rows))])
    is_separate = job.identity.documents == "separate"
    columns = [job.blocks.token_ids, job.blocks.document_ids if is_separate else None]
    ids = [
        column if column is None else column[padded, :-1].to(job.device.torch_device, torch.int64)
        for column in columns
    ]
    with torch.no_grad():
        return job.forward(*ids)


def time_forward(job: Job, rows: Tensor) -> float:
    """Return the seconds of `BARE_BATCHES` bare forward passes."""
    run_teacher(job, rows)  # the first pass compiles, allocates, picks kernels
    job.device.sync(wait=True)
    start = time.perf_counter()
    for _ in range(BARE_BATCHES):
        run_teacher(job, rows)
        job.device.sync(wait=True)
    return time.perf_counter() - start


def pack_batch(job: Job, rows: Tensor) -> codec.Fields:
    """Return a batch's fields on the device; nothing here waits for it."""
    output = run_teacher(job, rows)
    with torch.no_grad():
        if job.identity.content == "hidden":
            fields = codec.pack_hidden(output, job.channel_scale)
        else:
            fields = pack_logits(output, rows, job.identity)
    job.device.sync()
    return {name: field[: len(rows)] for name, field in fields.items()}


def pack_logits(logits: Tensor, rows: Tensor, identity: manifests.CacheIdentity) -> codec.Fields:
    """Return the fields of logits; draws depend on the seed and the sequence alone."""
    num_positions, vocab_size = logits.shape[1:]
    row_ids = (rows.tolist() + [int(rows[-1])] * len(logits))[: len(logits)]  # padding repeats
    generators = [np.random.default_rng([identity.seed, row]) for row in row_ids]
    if identity.content == "sampled":
        offsets = np.stack(
            [generator.random(num_positions, np.float32) for generator in generators]
        )
        offsets = torch.from_numpy(offsets).to(logits.device)
        fields = codec.pack_sampled(logits, identity.top_k, offsets, identity.num_draws)
    else:
        fields = codec.pack_top_k(logits, identity.top_k)
    if identity.num_negatives:
        shape = (num_positions, identity.num_negatives)
        ids = np.stack([generator.integers(vocab_size, size=shape) for generator in generators])
        fields |= codec.pack_negatives(logits, torch.from_numpy(ids).to(logits.device))
    return fields


def shard_fields(job: Job, rows: Tensor, parts: list[codec.Fields]) -> codec.Fields:
    """Return a shard's fields from its batches', those of the teacher on the device."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} | {
        "input_ids": job.blocks.token_ids[rows],
        "loss_mask": job.blocks.loss_mask[rows],
        "document_ids": job.blocks.document_ids[rows],
    }


def write_shard(job: Job, index: int, fields: codec.Fields) -> manifests.FileEntry:
    """Bring a shard to the host and write it; return the entry.

    Runs during the next forward pass, so without tensor operations: they would start threads of
    their own, and with more threads than cores those of the pass sleep after each operation,
    which takes 5% of its speed (libgomp).
    """
    fields = {name: field.cpu() for name, field in fields.items()}
    path = job.folder / shard.shard_name(index)
    num_sequences = len(fields["input_ids"])
    require_finite(fields, job)
    return shard.write_fields(path, fields, ids=job.id_dtype, num_sequences=num_sequences)


def require_finite(fields: codec.Fields, job: Job) -> None:
    """Refuse what a teacher computes where its numbers overflow, before it is written.

    Runs where `write_shard` does, so by numpy.
    """
    for name, field in fields.items():
        if field.is_floating_point() and not np.isfinite(field.numpy()).all():
            raise ValueError(
                f"the teacher gives {name} with NaN or infinity in {job.identity.dtype}; "
                "build the cache with --dtype fp32"
            )


def kept_shard(job: Job, index: int, rows: Tensor) -> manifests.FileEntry | None:
    """Return the entry of a shard that an earlier call finished, None where there is none."""
    path = job.folder / shard.shard_name(index)
    if not path.is_file():
        return None
    try:
        token_ids = shard.read_fields(path)["input_ids"].to(torch.int32)
    except (manifests.CacheMismatch, KeyError):
        return None  # written over below
    if not torch.equal(token_ids, job.blocks.token_ids[rows]):
        return None
    return shard.entry_of_file(path, len(rows))


def prepare_head(teacher: nn.Module, job: Job) -> Tensor:
    """Write what turns stored hidden states into logits; return its channel scale, (H,).

    It is written before the first shard and read by whoever continues the build: all shards must
    be packed with the scale that the reader unpacks with.
    """
    path = job.folder / HEAD_FILE
    try:
        return shard.read_fields(path)["channel_scale"].to(job.device.torch_device)
    except (manifests.CacheMismatch, KeyError):
        for file in job.folder.glob("shard_*"):  # packed with a scale that is lost
            file.unlink()
    rows = torch.arange(min(len(job.blocks), max(1, SCALE_TOKENS // job.identity.seq_len)))
    outputs = [run_teacher(job, part)[: len(part)].float() for part in rows.split(job.batch_size)]
    channel_scale = codec.usual_size(torch.cat(outputs))
    head = teacher.get_output_embeddings()
    fields = {"weight": head.weight.detach().cpu(), "channel_scale": channel_scale.cpu()}
    if getattr(head, "bias", None) is not None:
        fields["bias"] = head.bias.detach().cpu()
    scaling = zip(("factor", "softcap"), logit_scaling(teacher.config), strict=True)
    fields |= {name: torch.tensor(float(value)) for name, value in scaling if value is not None}
    shard.write_fields(path, fields, ids=job.id_dtype, num_sequences=0)
    return channel_scale


def rewrite_cache(cache: TeacherCache, folder: Path) -> manifests.CacheManifest:
    """Write the fields of any cache as they are, in shards of ours, into a new folder.

    What the content cannot say stays unsaid: a conditional cache stays conditional, and its
    fingerprint stays the same, so that runs resume with either.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it or choose another name")
    ids = shard.id_dtype(cache.vocab_size or 2**31)  # old caches may not say
    with atomic_folder(folder) as made:
        entries = []
        ranges = shard.shard_ranges(cache.num_sequences, cache.seq_len)
        for index, rows in tqdm(ranges.items(), unit="shard"):
            fields = cache.fields(rows.numpy())
            path = made / shard.shard_name(index)
            entries.append(shard.write_fields(path, fields, ids=ids, num_sequences=len(rows)))
        manifest = replace(cache.manifest, shards=tuple(entries))
        manifests.write_manifest(made, manifest)
    return manifest
