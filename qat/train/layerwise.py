"""The layer-by-layer stage of a run: which blocks are done, and what they learned."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat.cache.read import TeacherCache
from qat.model import surgery
from qat.model.head import Tokens
from qat.model.layers import FakeQuantWeight
from qat.runtime.memory import return_freed
from qat.storage.decode import Sha256, read_as, reading
from qat.storage.files import atomic_file, sha256_of_file, write_json
from qat.train import trainable
from qat.train.blockwise import BlockPlan, Teacher, train_blockwise
from qat.train.config import TrainConfig
from qat.train.schedule import rate_factor
from qat.train.state import copy_same

BLOCKS = "blocks"
WARMUP_SHARE = 0.05
UNTRAINED = ("bias", "indices")  # of a layer: what it has anyway


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockReport:
    """What is told of a finished block."""

    seconds: float
    """Of the stage, up to its end."""
    sha256: Sha256
    """Of the file with what it learned."""
    losses: dict[str, float]
    """First and last of its training."""


def layerwise_stage(
    config: TrainConfig,
    student: nn.Module,
    teacher: Teacher,
    cache: TeacherCache,
    *,
    weight_of: Callable[[str], Tensor | None],
    rates: dict[str, float],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Train a student block by block, and return the seconds that it took, all processes counted.

    A block that an earlier process finished is read from the run's folder instead. Both models are
    on the device; `rates` are the peaks of each part in this stage. Where no steps follow, no
    latent weights stay.
    """
    folder, options = config.output_dir / BLOCKS, config.layerwise
    done, seconds = read_blocks(folder, student, freeze=not config.max_steps)
    blocks = student.get_decoder().layers
    if done == len(blocks):
        return seconds
    surgery.hold_outer_weights(student, dtype)
    return_freed()
    chosen_ids = cache.spread_ids(options.sequences)
    moving = config.parts(is_low_rank=surgery.has_low_rank_scales(student))
    started = time.perf_counter() - seconds

    def prepare(
        _number: int, block: nn.Module
    ) -> tuple[list[FakeQuantWeight], torch.optim.Optimizer | None]:
        prefix = next(name for name, module in student.named_modules() if module is block)
        if not trainable.layers_to_train(block, config.kinds, config.formats):
            return [], None
        parts = trainable.choose_trainable(
            block,
            kinds=config.kinds,
            parts=tuple(part for part in moving if part != "norms"),
            weight_of=lambda name: weight_of(f"{prefix}.{name}"),
            formats=config.formats,
        )
        units = trainable.rate_units(block) if config.optim.relative else None
        optimizer = trainable.make_optimizer(parts, rates, config.optim.weight_decay, units)
        return trainable.trained_layers(block), optimizer

    def finish(number: int, losses: dict[str, float]) -> None:
        seconds = time.perf_counter() - started
        write_block(folder, number, blocks[number], seconds, losses)
        blocks[number].requires_grad_(False)
        if not config.max_steps:
            freeze_block(blocks[number])
        return_freed()  # latent weights and indices come and go at other sizes

    plan = block_plan(config, dtype)
    batches = partial(token_batches, cache, chosen_ids, options.batch_size, device)
    hooks = {"prepare": prepare, "finish": finish, "start_block": done}
    train_blockwise(student, teacher, batches, len(chosen_ids), plan, **hooks)
    return time.perf_counter() - started


def block_plan(config: TrainConfig, dtype: torch.dtype) -> BlockPlan:
    """Return how each decoder layer is trained."""
    options = config.layerwise
    return BlockPlan(
        num_epochs=options.epochs,
        batch_size=options.batch_size,
        rate=partial(block_rate, config.optim.min_lr_ratio),
        clip_grad_norm=config.optim.clip_grad_norm,
        seed=config.seed,
        dtype=dtype,
        scratch=config.output_dir / "hidden",
    )


def token_batches(
    cache: TeacherCache, sequence_ids: Sequence[int], batch_size: int, device: torch.device
) -> Iterator[Tokens]:
    """Yield a cache's sequences in order, on the device."""
    for start in range(0, len(sequence_ids), batch_size):
        batch = cache.batch(sequence_ids[start : start + batch_size])
        yield Tokens(batch.input_ids, batch.document_ids).to(device)


def block_rate(min_ratio: float, step: int, num_steps: int) -> float:
    """Return the share of the peak rate at a step of a block."""
    warmup = max(1, round(num_steps * WARMUP_SHARE))
    return rate_factor(step, max_steps=num_steps, warmup_steps=warmup, min_ratio=min_ratio)


def write_block(
    folder: Path, number: int, block: nn.Module, seconds: float, losses: dict[str, float]
) -> None:
    """Keep what a block learned; its report is written last and says that it is whole."""
    tensors = {}
    for name, layer in surgery.quantized_layers(block).items():
        if trainable.is_trained(layer):
            parts = {k: value for k, value in layer.state_dict().items() if k not in UNTRAINED}
            tensors |= {f"{name}.{part}": value.cpu().contiguous() for part, value in parts.items()}
    with atomic_file(folder / f"{number:03d}.safetensors") as temporary:
        save_file(tensors, temporary)
        sha256 = sha256_of_file(temporary)
    report = {"seconds": seconds, "sha256": sha256, "losses": losses}
    write_json(folder / f"{number:03d}.json", report)


def freeze_block(block: nn.Module) -> None:
    """Keep the indices that a block's latent weights came to in their place."""
    for layer in surgery.quantized_layers(block).values():
        surgery.freeze_indices(layer)


@torch.no_grad()
def read_blocks(folder: Path, student: nn.Module, *, freeze: bool = False) -> tuple[int, float]:
    """Put back what finished blocks learned; return how many there are and their seconds.

    Latent weights, or with `freeze` the indices that they come to.

    Raises:
        ValueError: If a block's file is not the one that was written.
    """
    seconds, number = 0.0, 0
    for number, block in enumerate(student.get_decoder().layers):
        report = folder / f"{number:03d}.json"
        if not report.is_file():
            return number, seconds
        told = read_as(report, BlockReport, remedy=f"remove {folder}")
        seconds = told.seconds
        layers = surgery.quantized_layers(block)
        stored = folder / f"{number:03d}.safetensors"
        if (found := sha256_of_file(stored)) != told.sha256:
            raise ValueError(f"{stored} has the sha256 {found}, not {told.sha256}; remove {folder}")
        with reading(stored, f"remove {folder}"):
            for key, value in load_file(stored).items():
                name, _, part = key.rpartition(".")
                layer = layers[name]
                if part == "latent_weight" and layer.latent_weight is None:
                    surgery.thaw_indices(layer)
                if part not in UNTRAINED:
                    copy_same(getattr(layer, part), value)
        if freeze:
            freeze_block(block)
    return number + 1, seconds
