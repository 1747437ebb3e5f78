"""Layer by layer: each transformer block learns the teacher block's output, then the next.

A block of the student reads what the quantized blocks before it make, and is pulled towards what
the teacher's block makes of the teacher's own hidden states; so later blocks mend what earlier ones
lost. Only one block has gradients and optimizer state at a time, and hidden states lie in files, so
memory stays near that of two forward passes.

    loss = mean over positions of |block(x_student) - target|^2 / |target|^2

each position by its own size: the first token's is a thousand times the others' and would rule.

Shape legend: N sequences, B batch, L tokens, H hidden.

Source: block-wise training of all parameters before end-to-end training, Chen et al. 2024
(EfficientQAT), arXiv:2407.11062, section 3.2.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.model.layers import FakeQuantLinear
from qat.runtime.device import as_operand, run_recorded
from qat.train.step import form_weights, pull_gradients

Call = dict[str, Any]


class StopForward(Exception):  # noqa: N818 a signal, not an error
    """Ends a forward pass once the wanted block has been reached."""


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


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the transformer blocks of a causal LM."""
    return model.get_decoder().layers


def block_calls(model: nn.Module, token_ids: Tensor) -> list[Call]:
    """Return the keyword arguments that each block is called with on a batch of this shape.

    Positions and masks follow from the shape alone, as sequences are packed and full.
    """
    calls: list[Call] = []

    def hook(_module: nn.Module, _inputs: tuple[Any, ...], kwargs: Call) -> None:
        calls.append({key: value for key, value in kwargs.items() if key != "hidden_states"})

    blocks = decoder_blocks(model)
    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad():
            model.get_decoder()(input_ids=token_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def first_inputs(model: nn.Module, token_ids: Tensor) -> Tensor:
    """Return what the first block reads for a batch, (B, L, H)."""
    caught: list[Tensor] = []

    def hook(_module: nn.Module, inputs: tuple[Any, ...], kwargs: Call) -> None:
        caught.append(inputs[0] if inputs else kwargs["hidden_states"])
        raise StopForward

    handle = decoder_blocks(model)[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            model.get_decoder()(input_ids=token_ids, use_cache=False)
    except StopForward:
        pass
    finally:
        handle.remove()
    return caught[0]


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
    """Take a file's room on the disk: a mapped file that finds none later kills the process."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        else:
            file.truncate(num_bytes)


@torch.no_grad()
def advance(
    block: nn.Module, states: HiddenStates, call: Call, plan: BlockPlan, device: Any
) -> None:
    """Replace hidden states by what a block makes of them."""
    for part in states.values.split(plan.batch_size):
        part.copy_(run_block(block, part.to(device), sized(call, len(part))))


def sized(call: Call, batch_size: int) -> Call:
    """Return a call cut to a smaller batch, as the last one of a pass is."""

    def cut(value: Any) -> Any:
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
    layers: list[FakeQuantLinear],
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    call: Call,
    plan: BlockPlan,
    device: torch.device,
) -> tuple[float, float]:
    """Train one block and return its mean loss over the first and the last epoch.

    Args:
        block: The student's, on the device.
        layers: Its layers that train.
        optimizer: Of their parameters.
        inputs: What the quantized blocks before it make, (N, L, H).
        targets: What the teacher's block makes of the teacher's hidden states, (N, L, H).
        call: The block's keyword arguments.
        plan: Epochs, batches, rates.
        device: Of the block.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    generator = torch.Generator().manual_seed(plan.seed)
    batches_an_epoch = -(-len(inputs) // plan.batch_size)
    num_steps = plan.num_epochs * batches_an_epoch
    means: list[float] = []
    step = 0
    for _ in range(plan.num_epochs):
        total = torch.zeros((), device=device)
        order = torch.randperm(len(inputs), generator=generator)
        for rows in order.split(plan.batch_size):
            form_weights(layers, plan.dtype)
            output = run_block(block, inputs[rows].to(device), sized(call, len(rows)))
            loss = block_loss(output, targets[rows].to(device))
            loss.backward()
            pull_gradients(layers)
            nn.utils.clip_grad_norm_(parameters, plan.clip_grad_norm or float("inf"))
            for group in optimizer.param_groups:
                group["lr"] = as_operand(group["peak_lr"] * plan.rate(step, num_steps), device)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
            run_recorded(device)
            step += 1
        means.append(float(total) / batches_an_epoch)
    return means[0], means[-1]


@torch.no_grad()
def start_states(
    model: nn.Module, batches: Iterator[Tensor], path: Path, dtype: torch.dtype, num_sequences: int
) -> HiddenStates:
    """Write what the first block reads for every sequence.

    Args:
        model: Whose embedding makes it.
        batches: Token ids (B, L) on the model's device.
        path: File for the hidden states.
        dtype: That they are kept in.
        num_sequences: N.
    """
    states, start = None, 0
    for token_ids in batches:
        hidden = first_inputs(model, token_ids)
        if states is None:
            states = HiddenStates(path, (num_sequences, *hidden.shape[1:]), dtype)
        states.values[start : start + len(hidden)] = hidden
        start += len(hidden)
    if states is None:
        raise ValueError("layer-by-layer training has no sequences; give a cache with some")
    return states


def train_blockwise(
    student: nn.Module,
    teacher: nn.Module,
    batches: Callable[[], Iterator[Tensor]],
    num_sequences: int,
    plan: BlockPlan,
    *,
    prepare: Callable[[int, nn.Module], tuple[list[FakeQuantLinear], torch.optim.Optimizer | None]],
    finish: Callable[[int, dict[str, float]], None],
    start_block: int = 0,
) -> None:
    """Train the blocks of a student one after the other.

    Args:
        student: Its weights held in the compute dtype.
        teacher: The full-precision model, of the same shape.
        batches: Gives token ids (B, L) of all sequences on the device, in order.
        num_sequences: How many there are.
        plan: How a block is trained.
        prepare: Makes a block's layers trainable; returns them and their optimizer.
        finish: Called when a block is done, with its losses; keeps what was learned.
        start_block: The first block to train; those before it are only passed through.
    """
    first = next(batches())
    device = first.device
    calls = {True: block_calls(student, first), False: block_calls(teacher, first)}
    reads = start_states(
        student, batches(), plan.scratch / "student.bin", plan.dtype, num_sequences
    )
    wants = start_states(
        teacher, batches(), plan.scratch / "teacher.bin", plan.dtype, num_sequences
    )
    pairs = list(zip(decoder_blocks(student), decoder_blocks(teacher), strict=True))
    bar = tqdm(total=len(pairs), initial=start_block, desc="layer by layer", unit="block")
    for number, (block, teacher_block) in enumerate(pairs):
        advance(teacher_block, wants, calls[False][number], plan, device)
        if number >= start_block:
            layers, optimizer = prepare(number, block)
            if optimizer is not None:
                before, after = train_block(
                    block,
                    layers,
                    optimizer,
                    reads.values,
                    wants.values,
                    calls[True][number],
                    plan,
                    device,
                )
                form_weights(layers, plan.dtype)
                finish(number, {"block/first_loss": before, "block/last_loss": after})
                bar.set_postfix(loss=f"{before:.4f} to {after:.4f}")
            bar.update()
        advance(block, reads, calls[True][number], plan, device)
    bar.close()
    reads.remove()
    wants.remove()
