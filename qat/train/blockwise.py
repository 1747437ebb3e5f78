"""Layer by layer: each transformer block learns the teacher block's output, then the next.

A block of the student reads what the quantized blocks before it make, and is pulled towards what
the teacher's block makes of the teacher's own hidden states; so later blocks correct what earlier
ones lost. Only one block has weights in the compute dtype, gradients and optimizer state at a time,
and hidden states lie in files: memory holds indices and scales, and of the teacher one block.

    loss = mean over positions of |block(x_student) - target|^2 / |target|^2

each position by its own size: the first token's is a thousand times the others' and would rule.

Shape legend: N sequences, B batch, L tokens, H hidden.

Source: block-wise training of all parameters before end-to-end training, Chen et al. 2024
(EfficientQAT), arXiv:2407.11062, section 3.2.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.calibrate.decoder_layers import around_layers, layer_calls
from qat.model.head import Tokens
from qat.model.layers import FakeQuantWeight
from qat.model.surgery import hold_weights, release_weights
from qat.runtime.device import run_recorded
from qat.train.step import form_weights, loss_scaler, optimizer_step, pull_gradients
from qat.train.trainable import mode

Call = dict[str, Any]
CallOf = Callable[[Tensor], Call]  # from the numbers of some sequences
Opened = Callable[..., AbstractContextManager[None]]  # from modules that have values inside it


@dataclass(frozen=True, slots=True)
class Teacher:
    """A full-precision model of a student's shape, whose blocks may have values in turn."""

    model: nn.Module
    opened: Opened = lambda *_modules: nullcontext()
    """Gives modules of it their values inside a block, where they are not there anyway."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPlan:
    """How every block is trained."""

    num_epochs: int
    batch_size: int
    """Sequences of a step."""
    rate: Callable[[int, int], float]
    """Share of the peak rate at (step, steps) of a block."""
    clip_grad_norm: float
    seed: int
    dtype: torch.dtype
    scratch: Path
    """Folder for hidden states."""


def calls_of(model: nn.Module, number: int, first: Tensor, documents: Tensor | None) -> CallOf:
    """Return the function from sequences to the keyword arguments of a block on them.

    `first` is a batch of the largest size, (B, L), and `documents` are all sequences', (N, L).
    """
    if documents is None:
        call = layer_calls(model, Tokens(first))[1][number]
        return lambda rows: sized(call, len(rows))

    def call_on(rows: Tensor) -> Call:
        found = documents[rows].to(first.device)
        return layer_calls(model, Tokens(torch.zeros_like(found), found))[1][number]

    return call_on


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Return a block's output hidden states, (B, L, H)."""
    output = block(hidden, **call)
    return output[0] if isinstance(output, tuple) else output


class HiddenStates:
    """Hidden states of all sequences, (N, L, H), in a file that is mapped and never read whole."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        count = shape[0] * shape[1] * shape[2]
        reserve(path, count * dtype.itemsize)
        flat = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
        self.values = flat.view(shape)

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def reserve(path: Path, num_bytes: int) -> None:
    """Reserve a file's space on the disk: a mapped file that finds none later kills the process."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        else:
            file.truncate(num_bytes)


@torch.no_grad()
def advance(
    block: nn.Module, states: HiddenStates, call_of: CallOf, plan: BlockPlan, device: torch.device
) -> None:
    """Replace hidden states by what a block makes of them."""
    values = states.values
    for rows in torch.arange(len(values)).split(plan.batch_size):
        part = values[rows[0] : rows[-1] + 1]
        part.copy_(run_block(block, part.to(device), call_of(rows)))


def sized(call: Call, batch_size: int) -> Call:
    """Return a call cut to a smaller batch, as the last one of a pass is."""

    def cut(value: object) -> object:
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] > batch_size:
            return value[:batch_size]
        if isinstance(value, tuple):
            return tuple(cut(item) for item in value)
        return value

    return {key: cut(value) for key, value in call.items()}


def block_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean relative squared error of positions, a float32 scalar."""
    error = (output.float() - target.float()).square().sum(-1)
    return (error / target.float().square().sum(-1).clamp_min(1e-12)).mean()


def train_block(
    block: nn.Module,
    layers: list[FakeQuantWeight],
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    call_of: CallOf,
    plan: BlockPlan,
    device: torch.device,
) -> tuple[float, float]:
    """Train one block from inputs to targets, (N, L, H); return its first and last epoch's loss."""
    generator = torch.Generator().manual_seed(plan.seed)
    scaler = loss_scaler(device, plan.dtype)
    batches_an_epoch = -(-len(inputs) // plan.batch_size)
    num_steps = plan.num_epochs * batches_an_epoch
    means: list[float] = []
    step = 0
    for _ in range(plan.num_epochs):
        total = torch.zeros((), device=device)
        order = torch.randperm(len(inputs), generator=generator)
        for rows in order.split(plan.batch_size):
            form_weights(layers, plan.dtype)
            with mode(block, is_training=True):
                output = run_block(block, inputs[rows].to(device), call_of(rows))
                loss = block_loss(output, targets[rows].to(device))
                (loss if scaler is None else scaler.scale(loss)).backward()
            pull_gradients(layers)
            optimizer_step(optimizer, scaler, plan.clip_grad_norm, plan.rate(step, num_steps))
            total += loss.detach()
            run_recorded(device)
            step += 1
        means.append(float(total) / batches_an_epoch)
    return means[0], means[-1]


@torch.no_grad()
def start_states(
    model: nn.Module,
    batches: Iterator[Tensor | Tokens],
    path: Path,
    dtype: torch.dtype,
    num_sequences: int,
) -> HiddenStates:
    """Write what the first block reads for every sequence to a file of a dtype, (N, L, H)."""
    states, start = None, 0
    for batch in batches:
        hidden, _calls = layer_calls(model, Tokens.of(batch))
        if states is None:
            states = HiddenStates(path, (num_sequences, *hidden.shape[1:]), dtype)
        states.values[start : start + len(hidden)] = hidden
        start += len(hidden)
    if states is None:
        raise ValueError("layer-by-layer training has no sequences; give a cache with some")
    return states


def train_blockwise(
    student: nn.Module,
    teacher: Teacher,
    batches: Callable[[], Iterator[Tensor | Tokens]],
    num_sequences: int,
    plan: BlockPlan,
    *,
    prepare: Callable[[int, nn.Module], tuple[list[FakeQuantWeight], torch.optim.Optimizer | None]],
    finish: Callable[[int, dict[str, float]], None],
    start_block: int = 0,
) -> None:
    """Train the blocks of a student one after the other.

    Args:
        student: Those of its weights that are in no block held in the compute dtype; of a block's,
            none is held afterwards.
        teacher: What it learns from.
        batches: Gives token ids (B, L) of all sequences on the device, in order; `Tokens` where
            documents are packed.
        num_sequences: N, how many there are.
        plan: How a block is trained.
        prepare: Makes a block's layers trainable; returns them and their optimizer, None where
            there is nothing to train.
        finish: Called when a block is done, with its losses; keeps what was learned.
        start_block: The first block to train; those before it are only passed through.
    """
    first = Tokens.of(next(batches()))
    device, documents = first.token_ids.device, None
    if first.document_ids is not None:
        documents = torch.cat([batch.document_ids.cpu() for batch in batches()])
    call_of = partial(calls_of, first=first.token_ids, documents=documents)
    start = partial(start_states, dtype=plan.dtype, num_sequences=num_sequences)
    reads = start(student, batches(), plan.scratch / "student.bin")
    with teacher.opened(*around_layers(teacher.model)):
        targets = start(teacher.model, batches(), plan.scratch / "teacher.bin")
    models = (student, teacher.model)
    pairs = list(zip(*(model.get_decoder().layers for model in models), strict=True))
    bar = tqdm(total=len(pairs), initial=start_block, desc="layer by layer", unit="block")
    for number, (block, teacher_block) in enumerate(pairs):
        call = call_of(student, number)  # what goes with hidden states follows from tokens alone
        with teacher.opened(teacher_block):
            advance(teacher_block, targets, call, plan, device)
        hold_weights(block, plan.dtype)
        losses: dict[str, float] = {}
        layers, optimizer = prepare(number, block) if number >= start_block else ([], None)
        if optimizer is not None:
            states = (reads.values, targets.values)
            before, after = train_block(block, layers, optimizer, *states, call, plan, device)
            del optimizer  # not held while the next one's is made
            form_weights(layers, plan.dtype)
            losses = {"block/first_loss": before, "block/last_loss": after}
            bar.set_postfix(loss=f"{before:.4f} to {after:.4f}")
        advance(block, reads, call, plan, device)
        release_weights(block)
        if number >= start_block:
            finish(number, losses)
            bar.update()
    bar.close()
    reads.remove()
    targets.remove()
