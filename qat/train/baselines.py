"""The steps that ours is measured against, on a model's shape: plain, and rank by rank.

Plain fine-tuning is given its cheapest form: float32 master weights cast once a step, the same
layers trained, the same loss, optimizer and batch. What is left over is fake quantization.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qat.distill.kl import forward_kl
from qat.grids.scalar import nearest_indices, over_scale
from qat.grids.scales import GAUSSIAN_REACH, start_scale
from qat.model import surgery
from qat.model.layers import FakeQuantLinear, FakeQuantWeight
from qat.model.rankwise import RankwiseLinear
from qat.quant.fit import fit_weight
from qat.quant.plan import QuantPlan, parse_plan, tensor_kind
from qat.quant.spec import TensorSpec
from qat.train.step import Trainer
from qat.train.trainable import choose_trainable, make_optimizer, trained_layers

RATE = 1e-5
GROUPED = "q2a4"
RANKS = {"mlp": 32, "attention": 8}  # of the seeds' q2a4


class PlainLinear(nn.Module):
    """A linear with a float32 master weight and a copy in the compute dtype."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.latent_weight = nn.Parameter(linear.weight.detach().float())
        self.bias = linear.bias
        self.held_weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias."""
        return nn.functional.linear(x, self.held_weight, self.bias)


class PlainTrainer(Trainer):
    """The same step without a grid."""

    @torch.no_grad()
    def form(self) -> None:
        """Cast every master weight once."""
        for layer in self.layers:
            layer.held_weight = layer.latent_weight.to(self.dtype).requires_grad_()

    def pull(self) -> None:
        """Cast every gradient once."""
        for layer in self.layers:
            gradient, layer.held_weight.grad = layer.held_weight.grad, None
            layer.latent_weight.grad = self.sums.pop(layer) if self.sums else gradient.float()

    def settle(self) -> None:
        """Leave weights where they are: they have no scales."""


def plan_of(model: nn.Module, *, is_low_rank: bool = False) -> QuantPlan:
    """Return q2a4 for a model, with the seeds' low-rank scales where asked."""
    plan = parse_plan(GROUPED).resolve(surgery.model_tensors(model))
    if not is_low_rank:
        return plan
    ranks = {name: RANKS[tensor_kind(name)] for name in plan.quantized}
    return plan.with_specs({name: plan.quantized[name].with_rank(ranks[name]) for name in ranks})


@torch.no_grad()
def round_linears(model: nn.Module, plan: QuantPlan) -> None:
    """Turn a model into a student rounded to the grid, in place: quick, and like a fitted one.

    Its logits are of the size of the model's. Those of random weights are so far apart that most
    probabilities are denormal numbers, which a CPU takes ten times as long over.
    """
    surgery.replace_weights(model, plan, rounded_layer)


def rounded_layer(name: str, linear: nn.Linear, spec: TensorSpec) -> FakeQuantLinear:
    """Return a layer of evenly spaced values, as far as suits a normal distribution."""
    layer = surgery.empty_layer(name, linear, spec).to(linear.weight.device)
    if not spec.grid.num_values:
        layer.take(fit_weight(linear.weight, spec))
        layer.bias = linear.bias
        return layer
    num_groups = 1 if spec.rank else spec.scale.groups_of(linear.in_features)
    weight = linear.weight.float()
    even = weight.new_ones(linear.in_features)
    reach = GAUSSIAN_REACH[int(spec.bits)] * start_scale(weight, even, num_groups)
    layer.codebook.copy_(torch.linspace(-1, 1, len(layer.codebook)))
    layer.indices.copy_(nearest_indices(over_scale(weight, reach), layer.codebook))
    if spec.rank:
        layer.scale_a.copy_(reach / spec.rank)
        layer.magnitude.fill_(1.0)
        layer.scale_b.fill_(1.0)
    else:
        layer.scale.copy_(reach)
    layer.bias = linear.bias
    return layer


def make_case(case: str, model: nn.Module, dtype: torch.dtype, sync: Callable[[], None]) -> Trainer:
    """Return the trainer of a case: MLP layers train, all else is frozen."""
    model.requires_grad_(False)
    make = Trainer
    if case == "plain":
        make = PlainTrainer
        layers: list[Any] = []
        for name, linear in surgery.dense_weights(model, plan_of(model)).items():
            if tensor_kind(name) == "mlp":
                layers.append(PlainLinear(linear).to(linear.weight.device))
                surgery.swap(model, name, layers[-1])
        chosen = {"weights": [layer.latent_weight for layer in layers]}
    else:
        round_linears(model, plan_of(model, is_low_rank=case != "fake-quant"))
        parts = ("weights", "scales") if case == "fake-quant" else ("scales",)
        chosen = choose_trainable(model, kinds=("mlp",), parts=parts, weight_of=lambda _name: None)
        surgery.hold_weights(model, dtype)
        layers = trained_layers(model)
        if case == "rank-by-rank":
            layers, chosen = [], {"scales": go_rank_by_rank(model)}
    return make(
        model=model,
        layers=layers,
        optimizer=make_optimizer(chosen, dict.fromkeys(chosen, RATE)),
        divergence=forward_kl,
        dtype=dtype,
        clip_grad_norm=1.0,
        sync=sync,
    )


def go_rank_by_rank(model: nn.Module) -> list[nn.Parameter]:
    """Swap every quantized layer for its rank-by-rank form; return what trains in MLP layers."""
    trained: list[nn.Parameter] = []
    mlp = surgery.layers_of_kind(model, "mlp")
    layers: dict[str, FakeQuantWeight] = surgery.quantized_layers(model)
    for name, layer in layers.items():
        rankwise = RankwiseLinear(layer)
        surgery.swap(model, name, rankwise)
        factors = [rankwise.scale_a, rankwise.magnitude, rankwise.scale_b]
        for factor in factors:
            factor.requires_grad_(name in mlp)
        if name in mlp:
            trained += factors
    return trained
