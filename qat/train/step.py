"""One optimizer step: weights formed once, micro-batches through them, one pass of gradients back.

    form_weights      W_hat of every trained layer, in the compute dtype, as a leaf
    micro-batches     run on it as on a plain linear; its gradient adds up
    pull_gradients    d_latent, d_scale, d_codebook from that one gradient

so fake quantization costs two passes over the weights a step, however many tokens it has.
"""

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from qat.distill.candidates import candidate_logits
from qat.distill.kl import StudentLogits, hard_top1
from qat.distill.objective import Divergence, chunked_loss
from qat.distill.teacher import TeacherSignal
from qat.grids.scales import TensorScale
from qat.model.head import hidden_states, logits_at, logits_of
from qat.model.layers import FakeQuantWeight, TiedHead
from qat.model.surgery import (
    hold_values,
    hold_weight,
    keep_scales_storable,
    outer_layers,
    release_weights,
)
from qat.quant.straight_through import multiply_by_values, weight_gradients
from qat.runtime import distributed
from qat.runtime.device import as_operand
from qat.train.ema import MovingAverage
from qat.train.trainable import mode

Gradients = dict[FakeQuantWeight, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A micro-batch on the device, its teacher unpacked where it is asked for and not kept.

    Packed fields are a few times smaller than the signal, those of hidden states hundreds of times:
    a step holds the signal of one micro-batch at a time.
    """

    token_ids: Tensor
    """(B, L) int64."""
    mask: Tensor
    """(B, T) bool; True = the position counts."""
    unpack: Callable[[], TeacherSignal]
    """Gives the teacher on the T = L - 1 positions that predict a token."""
    document_ids: Tensor | None = None
    """(B, L), as `hidden_states` takes them."""
    num_sequences: int | None = None
    """Sequences that all processes have of it together; None = B."""

    @property
    def num_tokens(self) -> int:
        """Return the tokens that all processes have of it together."""
        return (self.num_sequences or len(self.token_ids)) * self.token_ids.shape[1]

    @classmethod
    def of(
        cls, token_ids: Tensor, signal: TeacherSignal, document_ids: Tensor | None = None
    ) -> "Batch":
        """Return a micro-batch whose signal is at hand."""
        return cls(
            token_ids=token_ids, mask=signal.mask, unpack=lambda: signal, document_ids=document_ids
        )


@torch.no_grad()
def form_weights(layers: Iterable[FakeQuantWeight], dtype: torch.dtype) -> None:
    """Hold each layer's fake-quantized weight as a leaf that collects a gradient."""
    for layer in layers:
        hold_values(layer)
        hold_weight(layer, dtype)
        layer.held_weight.requires_grad_()


def add_gradients(layers: Iterable[FakeQuantWeight], sums: Gradients) -> None:
    """Move each held weight's gradient into its float32 sum.

    A leaf adds up in its own dtype, where bfloat16's 8 bits lose what a micro-batch adds.
    """
    for layer in layers:
        gradient, layer.held_weight.grad = layer.held_weight.grad, None
        if layer in sums:
            sums[layer] += gradient
        else:
            sums[layer] = gradient.float()


def pull_gradients(layers: Iterable[FakeQuantWeight], sums: Gradients | None = None) -> None:
    """Turn each held weight's gradient into those of the layer's parameters, and drop it.

    Args:
        layers: With held weights.
        sums: Gradients of several micro-batches, emptied; those of the held weights if not given.
    """
    for layer in layers:
        gradient, layer.held_weight.grad = layer.held_weight.grad, None
        gradient = sums.pop(layer) if sums else distributed.own_part(gradient)
        if layer.held_values is not None and layer.spec.rank and layer.spec.floor is None:
            # Factors alone train: neither scales nor indices are looked at.
            multiply_by_values(gradient, layer.held_values)
            set_factor_gradients(layer, gradient)
        else:
            pull_layer(layer, gradient)


def pull_layer(layer: FakeQuantWeight, gradient: Tensor) -> None:
    """Turn a weight's gradient, (O, I), into those of a layer's parameters, in its place."""
    latent, codebook, order = layer.latent_weight, layer.stored_codebook(), None
    scale, offset = layer.expand()
    parts = (latent, scale, offset, codebook)
    needed = tuple(part is not None and part.requires_grad for part in parts)
    source, *scales, codebook = (None if part is None else part.detach() for part in parts)
    if source is None:
        source = layer.indices
    elif codebook is not None:
        codebook, order = codebook.sort()
    held = distributed.own_part(layer.held_weight).detach()
    is_exact = latent is not None and offset is None and held.dtype == torch.float32
    d_latent, d_scale, d_offset, d_codebook = weight_gradients(
        layer.spec.grid,
        source,
        tuple(scales),
        codebook,
        gradient,
        needed,
        formed=held if is_exact else None,
        overwrites=True,
    )
    if d_latent is not None:
        latent.grad = d_latent
    if d_codebook is not None:
        layer.codebook.grad = d_codebook if order is None else d_codebook[order.argsort()]
    if d_scale is not None:
        scale.backward(d_scale)
    if d_offset is not None:
        offset.backward(d_offset)


@torch.no_grad()
def set_factor_gradients(layer: FakeQuantWeight, d_scale: Tensor) -> None:
    """Give the factors of low-rank scales that train their gradients."""
    parts = {name: layer.stored(values) for name, values in layer.parts.items()}
    for name, gradient in layer.spec.scale.pull(parts, d_scale).items():
        if (parameter := getattr(layer, name)).requires_grad:
            parameter.grad = gradient


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    clip_grad_norm: float,
    rate: float,
    split: Collection[Tensor] = (),
) -> Tensor:
    """Clip, step at a share of the peak rates, drop the gradients; return their norm.

    A step whose float16 gradient overflowed is left out, and its norm is zero. Below a loss scale
    of one nothing overflows that is finite: such a gradient is reported as it is. Of parameters in
    `split` this process has some rows.
    """
    if scaler is not None:
        scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = gradient_norm(parameters, split)
    nn.utils.clip_grads_with_norm_(parameters, clip_grad_norm or float("inf"), norm)
    set_rates(optimizer, rate, norm.device)
    if scaler is None:
        optimizer.step()
    else:
        overflowed = ~torch.isfinite(norm) & (loss_scale(scaler, norm.device) >= 1)
        scaler.step(optimizer)
        scaler.update()
        norm = torch.where(overflowed, torch.zeros_like(norm), norm)
    optimizer.zero_grad(set_to_none=True)
    return norm


def set_rates(optimizer: torch.optim.Optimizer, rate: float, device: torch.device) -> None:
    """Give each group of parameters a share of its peak rate, in a tensor where it is in one."""
    for group in optimizer.param_groups:
        value = as_operand(group["peak_lr"] * rate, device)
        if isinstance(group["lr"], Tensor) and not isinstance(value, Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def gradient_norm(parameters: list[Tensor], split: Collection[Tensor]) -> Tensor:
    """Return the norm of all gradients, those of rows that other processes have among them."""
    gradients = [p.grad for p in parameters if p.grad is not None and p not in split]
    norm = nn.utils.get_total_norm(gradients)
    if not split:
        return norm
    own = nn.utils.get_total_norm([p.grad for p in split if p.grad is not None])
    return (norm.square() + distributed.total(own.square())).sqrt()


def loss_scale(scaler: torch.amp.GradScaler, device: torch.device) -> Tensor:
    """Return what losses are multiplied with, a scalar on the device."""
    return scaler.scale(torch.ones((), device=device))


@dataclass(slots=True)
class Trainer:
    """What a step works with."""

    model: nn.Module
    layers: list[FakeQuantWeight]
    optimizer: torch.optim.Optimizer
    divergence: Divergence
    dtype: torch.dtype
    clip_grad_norm: float
    sync: Callable[[], None]
    ema: MovingAverage | None = None
    scaler: torch.amp.GradScaler | None = None
    """Keeps float16 gradients above its smallest number; None for other dtypes."""
    seen: Tensor | None = None
    """Tokens of the training data, (V,) bool: rows of others in embedding and head stay as they
    are, where the optimizer would take steps of full size on next to no gradient. None = all."""
    autocast_dtype: torch.dtype | None = None
    """What float32 weights are multiplied in; None where layers hold weights of the dtype."""
    split: dict[Tensor, int] = field(default_factory=dict)
    """Parameters of which this process has some rows, and how many all have."""
    forms_in_use: bool = False
    """Whether decoder layers form their weights as they run, recomputed in the backward pass."""
    before_update: Callable[[], None] = lambda: None
    """Waits for who still reads what an update changes, such as a state that is being copied."""
    sums: Gradients = field(default_factory=dict)
    """Float32 gradients of held weights while a step has several micro-batches."""

    def step(
        self, batches: list[Batch], rate: float, hard_weight: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take one optimizer step over micro-batches.

        Every counted position weighs the same, whichever micro-batch or process it is in: of
        several processes, each with its share of the sequences, all take the same step.

        Args:
            batches: Of the step.
            rate: Share of the peak learning rates.
            hard_weight: Of the cross-entropy on the teacher's likeliest token; None = no such term.

        Returns:
            Loss and gradient norm, scalars on the device.
        """
        self.form()
        with mode(self.model, is_training=True):
            loss = self.accumulate(batches, hard_weight)
        self.pull()
        self.before_update()
        norm = optimizer_step(
            self.optimizer, self.scaler, self.clip_grad_norm, rate, self.split.keys()
        )
        self.settle()
        if self.ema is not None:
            self.ema.update()
        self.sync()
        return loss, norm

    def form(self) -> None:
        """Hold the weights that this step runs on."""
        distributed.drop_gathered(self.model)
        if self.forms_in_use:
            release_weights(self.model.get_decoder().layers)  # an evaluation may have held them
        form_weights(self.formed, self.dtype)

    def pull(self) -> None:
        """Bring the gradients of held weights to what trains."""
        pull_gradients(self.formed, self.sums)
        if self.seen is not None:
            for layer in token_layers(self.model) & set(self.layers):
                drop_unseen(layer, self.seen)
        distributed.sum_gradients(p for p in self.parameters if p not in self.split)

    def settle(self) -> None:
        """Bring what an update drove out of what files hold back into its range."""
        keep_scales_storable(self.layers)

    def accumulate(self, batches: list[Batch], hard_weight: float | None) -> Tensor:
        """Add up the gradients of micro-batches; return the mean loss."""
        divergence, device = self.divergence, batches[0].token_ids.device
        if hard_weight is not None:
            weight = as_operand(hard_weight, device)
            divergence = partial(with_hard, self.divergence, weight)
        scale = None if self.scaler is None else loss_scale(self.scaler, device)
        if scale is not None:  # within the divergence: gradients of hidden states are float16 too
            divergence = partial(scaled, divergence, scale)
        counts = torch.stack([batch.mask.sum() for batch in batches])
        shares = counts / distributed.total(counts.sum()).clamp_min(1)
        total = torch.zeros((), device=device)
        # Gradients of split weights come in float32.
        is_summed = len(batches) > 1 and self.dtype != torch.float32 and not self.split
        for share, batch in zip(shares, batches, strict=True):
            with self.computing():
                hidden = hidden_states(self.model, batch.token_ids, batch.document_ids)[:, :-1]
                loss = share * chunked_loss(
                    hidden, self.head, batch.unpack(), divergence, head_weight=self.head_weight()
                )
            loss.backward()
            total += loss.detach()
            if is_summed:
                add_gradients(self.formed, self.sums)
        total = distributed.total(total)
        return total if scale is None else total / scale

    @property
    def formed(self) -> list[FakeQuantWeight]:
        """Return the trained layers whose weights are formed once a step."""
        if not self.forms_in_use:
            return self.layers
        outer = set(outer_layers(self.model).values())
        return [layer for layer in self.layers if layer in outer]

    @property
    def parameters(self) -> list[Tensor]:
        """Return what trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def device(self) -> torch.device:
        """Return where the parameters are that train."""
        return self.parameters[0].device

    @property
    def num_trained(self) -> int:
        """Return how many numbers train."""
        return sum(p.numel() for p in self.parameters)

    def averaged(self) -> AbstractContextManager[None]:
        """Put the moving average in the parameters' place inside the block, if there is one."""
        return self.ema.in_place() if self.ema else nullcontext()

    def computing(self) -> AbstractContextManager[None]:
        """Multiply float32 weights in another dtype inside the block, where one is asked for."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def peak_rate(self) -> float:
        """Return the highest peak learning rate of any part."""
        return max(group["peak_lr"] for group in self.optimizer.param_groups)

    def head_weight(self) -> Tensor | None:
        """Return the head's weight where it trains, alone or tied to the embedding."""
        head = self.model.get_output_embeddings()
        layer = head.tied[0] if isinstance(head, TiedHead) else head
        if not isinstance(layer, FakeQuantWeight):
            return layer.weight if layer.weight.requires_grad else None
        weight = layer.held_weight if layer in self.layers else None
        return weight if weight is not None and weight.requires_grad else None

    def head(self, hidden: Tensor, signal: TeacherSignal) -> StudentLogits:
        """Return all logits of hidden states (N, H), or candidates' where negatives are drawn."""
        if signal.negative_ids is None:
            return logits_of(self.model, hidden)
        known = logits_at(self.model, hidden, signal.token_ids)
        negatives = logits_at(self.model, hidden, signal.negative_ids[0])
        return candidate_logits(signal, known, negatives, self.model.config.vocab_size)


def token_layers(model: nn.Module) -> set[nn.Module]:
    """Return embedding and head: their rows are tokens."""
    return {model.get_input_embeddings(), model.get_output_embeddings()}


def drop_unseen(layer: FakeQuantWeight, seen: Tensor) -> None:
    """Zero the gradients of rows whose tokens the training data lacks."""
    shared = layer.scale if isinstance(layer.spec.scale, TensorScale) else None
    for parameter in layer.parameters():
        if parameter.grad is not None and parameter.grad.dim() == 2 and parameter is not shared:
            parameter.grad *= seen[layer.rows or slice(None)].unsqueeze(1)


def with_hard(
    soft: Divergence, hard_weight: float | Tensor, logits: StudentLogits, signal: TeacherSignal
) -> Tensor:
    """Return a divergence plus the weighted cross-entropy on the teacher's likeliest token."""
    return soft(logits, signal) + hard_weight * hard_top1(logits, signal)


def scaled(
    divergence: Divergence, scale: Tensor, logits: StudentLogits, signal: TeacherSignal
) -> Tensor:
    """Return a divergence times a scale."""
    return divergence(logits, signal) * scale


def loss_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler | None:
    """Return what scales losses in float16; None for dtypes of a wider range."""
    return torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
