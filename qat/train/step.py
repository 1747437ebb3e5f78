"""One optimizer step: weights formed once, micro-batches through them, one pass of gradients back.

    form_weights      W_hat of every trained layer, in the compute dtype, as a leaf
    micro-batches     run on it as on a plain linear; its gradient adds up
    pull_gradients    d_latent, d_scale, d_codebook from that one gradient

so fake quantization costs two passes over the weights a step, however many tokens it has.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from qat.distill.candidates import candidate_logits
from qat.distill.kl import StudentLogits, hard_top1
from qat.distill.objective import Divergence, chunked_loss
from qat.distill.teacher import TeacherSignal
from qat.model.head import hidden_states, logits_at, logits_of
from qat.model.layers import FakeQuantLinear
from qat.quant.straight_through import dequantize_gradients, fake_quantize_gradients
from qat.runtime.device import as_operand
from qat.train.ema import MovingAverage

Batch = tuple[Tensor, TeacherSignal]


@torch.no_grad()
def form_weights(layers: Iterable[FakeQuantLinear], dtype: torch.dtype) -> None:
    """Hold each layer's fake-quantized weight as a leaf that collects a gradient."""
    for layer in layers:
        layer.held_weight = layer.fake_quantized_weight(dtype).requires_grad_()


def pull_gradients(layers: Iterable[FakeQuantLinear]) -> None:
    """Turn each held weight's gradient into those of the layer's parameters, and drop it."""
    for layer in layers:
        gradient, layer.held_weight.grad = layer.held_weight.grad, None
        scale = layer.full_scale()
        codebook = layer.stored(layer.codebook.detach())
        wanted = (scale.requires_grad, layer.codebook.requires_grad)
        if layer.latent_weight is None:
            d_scale, d_codebook = dequantize_gradients(
                layer.indices, scale.detach(), codebook, gradient, *wanted
            )
        else:
            codebook, order = codebook.sort()
            layer.latent_weight.grad, d_scale, d_codebook = fake_quantize_gradients(
                layer.latent_weight.detach(),
                scale.detach(),
                codebook,
                gradient,
                layer.latent_weight.requires_grad,
                *wanted,
            )
            if d_codebook is not None:
                d_codebook = d_codebook[order.argsort()]
        if d_codebook is not None:
            layer.codebook.grad = d_codebook
        if d_scale is not None:
            scale.backward(d_scale)


@dataclass(slots=True)
class Trainer:
    """What a step works with."""

    model: nn.Module
    layers: list[FakeQuantLinear]
    optimizer: torch.optim.Optimizer
    divergence: Divergence
    dtype: torch.dtype
    clip_grad_norm: float
    sync: Callable[[], None]
    ema: MovingAverage | None = None

    def step(
        self, batches: list[Batch], rate: float, hard_weight: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take one optimizer step over micro-batches.

        Every counted position weighs the same, whichever micro-batch it is in.

        Args:
            batches: Token ids (B, L) and signals on the device.
            rate: Share of the peak learning rates.
            hard_weight: Of the cross-entropy on the teacher's likeliest token; None = no such term.

        Returns:
            Loss and gradient norm, scalars on the device.
        """
        self.form()
        loss = self.accumulate(batches, hard_weight)
        self.pull()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self.clip_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        for group in self.optimizer.param_groups:
            group["lr"] = as_operand(group["peak_lr"] * rate, loss.device)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update()
        self.sync()
        return loss, norm

    def form(self) -> None:
        """Hold the weights that this step runs on."""
        form_weights(self.layers, self.dtype)

    def pull(self) -> None:
        """Bring the gradients of held weights to what trains."""
        pull_gradients(self.layers)

    def accumulate(self, batches: list[Batch], hard_weight: float | None) -> Tensor:
        """Add up the gradients of micro-batches; return the mean loss."""
        divergence = self.divergence
        if hard_weight is not None:
            weight = as_operand(hard_weight, batches[0][0].device)
            divergence = partial(with_hard, self.divergence, weight)
        counts = torch.stack([signal.mask.sum() for _, signal in batches])
        shares = counts / counts.sum().clamp_min(1)
        total = torch.zeros((), device=counts.device)
        for share, (token_ids, signal) in zip(shares, batches, strict=True):
            hidden = hidden_states(self.model, token_ids)[:, :-1]
            loss = share * chunked_loss(hidden, self.head, signal, divergence)
            loss.backward()
            total += loss.detach()
        return total

    @property
    def num_trained(self) -> int:
        """Return how many numbers train."""
        return sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])

    def averaged(self) -> AbstractContextManager[None]:
        """Put the moving average in the parameters' place inside the block, if there is one."""
        return self.ema.in_place() if self.ema else nullcontext()

    def peak_rate(self) -> float:
        """Return the highest peak learning rate of any part."""
        return max(group["peak_lr"] for group in self.optimizer.param_groups)

    def head(self, hidden: Tensor, signal: TeacherSignal) -> StudentLogits:
        """Return all logits of hidden states (N, H), or candidates' where negatives are drawn."""
        if signal.negative_ids is None:
            return logits_of(self.model, hidden)
        known = logits_at(self.model, hidden, signal.token_ids)
        negatives = logits_at(self.model, hidden, signal.negative_ids[0])
        return candidate_logits(signal, known, negatives, self.model.config.vocab_size)


def with_hard(
    soft: Divergence, hard_weight: float | Tensor, logits: StudentLogits, signal: TeacherSignal
) -> Tensor:
    """Return a divergence plus the weighted cross-entropy on the teacher's likeliest token."""
    return soft(logits, signal) + hard_weight * hard_top1(logits, signal)
