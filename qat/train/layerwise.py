"""The layer-by-layer stage of a run: which blocks are done, and what they learned."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat.cache.read import TeacherCache
from qat.model.head import Tokens
from qat.model.layers import FakeQuantWeight
from qat.model.surgery import (
    has_low_rank_scales,
    hold_weights,
    quantized_layers,
    thaw_indices,
)
from qat.storage.files import atomic_file, read_json, write_json
from qat.train.blockwise import BlockPlan, train_blockwise
from qat.train.config import TrainConfig
from qat.train.schedule import rate_factor
from qat.train.trainable import choose_trainable, make_optimizer

BLOCKS = "blocks"
WARMUP_SHARE = 0.05


def layerwise_stage(
    config: TrainConfig,
    student: nn.Module,
    teacher: nn.Module,
    cache: TeacherCache,
    *,
    weight_of: Callable[[str], Tensor | None],
    rates: dict[str, float],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Train a student block by block, and return the seconds that it took, all processes counted.

    A block that an earlier process finished is read from the run's folder instead.

    Args:
        config: The run's.
        student: On the device.
        teacher: The full-precision model, on the device.
        cache: Gives the sequences.
        weight_of: Full-precision weight of a layer by name, None where unknown.
        rates: Peak rate of each part in this stage.
        device: Of both models.
        dtype: Compute dtype.
    """
    folder = config.output_dir / BLOCKS
    hold_weights(student, dtype)
    done, seconds = read_blocks(folder, student, weight_of)
    if done == len(student.get_decoder().layers):
        return seconds
    chosen_ids = cache.sequence_ids("train")[: config.layerwise.sequences]
    moving = config.parts(is_low_rank=has_low_rank_scales(student))
    clock = [time.perf_counter(), seconds]

    def batches() -> Iterator[Tokens]:
        size = config.layerwise.batch_size
        for start in range(0, len(chosen_ids), size):
            batch = cache.batch(chosen_ids[start : start + size])
            yield Tokens(batch.input_ids, batch.document_ids).to(device)

    def prepare(
        number: int, block: nn.Module
    ) -> tuple[list[FakeQuantWeight], torch.optim.Optimizer | None]:
        prefix = block_prefix(student, block)
        parts = choose_trainable(
            block,
            kinds=config.kinds,
            parts=tuple(part for part in moving if part != "norms"),
            weight_of=lambda name: weight_of(f"{prefix}.{name}"),
        )
        layers = [layer for layer in quantized_layers(block).values() if trains(layer)]
        return layers, make_optimizer(parts, rates, weight_decay=config.optim.weight_decay)

    def finish(number: int, losses: dict[str, float]) -> None:
        clock[1] += time.perf_counter() - clock[0]
        clock[0] = time.perf_counter()
        block = student.get_decoder().layers[number]
        write_block(folder, number, block, {**losses, "seconds": clock[1]})
        block.requires_grad_(False)

    plan = BlockPlan(
        num_epochs=config.layerwise.epochs,
        batch_size=config.layerwise.batch_size,
        rate=partial(block_rate, config.optim.min_lr_ratio),
        clip_grad_norm=config.optim.clip_grad_norm,
        seed=config.seed,
        dtype=dtype,
        scratch=config.output_dir / "hidden",
    )
    train_blockwise(
        student,
        teacher,
        batches,
        len(chosen_ids),
        plan,
        prepare=prepare,
        finish=finish,
        start_block=done,
    )
    return clock[1]


def block_rate(min_ratio: float, step: int, num_steps: int) -> float:
    """Return the share of the peak rate at a step of a block."""
    warmup = max(1, round(num_steps * WARMUP_SHARE))
    return rate_factor(step, max_steps=num_steps, warmup_steps=warmup, min_ratio=min_ratio)


def trains(layer: FakeQuantWeight) -> bool:
    """Return whether anything of a layer trains."""
    return any(parameter.requires_grad for parameter in layer.parameters())


def block_prefix(model: nn.Module, block: nn.Module) -> str:
    """Return the dotted name of a block."""
    return next(name for name, module in model.named_modules() if module is block)


def write_block(folder: Path, number: int, block: nn.Module, report: dict[str, float]) -> None:
    """Keep what a block learned; its report is written last and says that it is whole."""
    tensors = {}
    for name, layer in quantized_layers(block).items():
        if trains(layer):
            parts = {part: value for part, value in layer.state_dict().items() if part != "bias"}
            tensors |= {f"{name}.{part}": value.cpu().contiguous() for part, value in parts.items()}
    with atomic_file(folder / f"{number:03d}.safetensors") as temporary:
        save_file(tensors, temporary)
    write_json(folder / f"{number:03d}.json", report)


@torch.no_grad()
def read_blocks(
    folder: Path, student: nn.Module, weight_of: Callable[[str], Tensor | None]
) -> tuple[int, float]:
    """Put back what finished blocks learned; return how many there are and their seconds."""
    seconds, number = 0.0, 0
    for number, block in enumerate(student.get_decoder().layers):
        report = folder / f"{number:03d}.json"
        if not report.is_file():
            return number, seconds
        seconds = read_json(report)["seconds"]
        layers = quantized_layers(block)
        for key, value in load_file(folder / f"{number:03d}.safetensors").items():
            name, _, part = key.rpartition(".")
            layer = layers[name]
            if part == "latent_weight" and layer.latent_weight is None:
                thaw_indices(layer)
            getattr(layer, part).copy_(value)
        hold_weights(block, next(iter(layers.values())).held_weight.dtype)
    return number + 1, seconds
