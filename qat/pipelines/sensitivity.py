"""The table that an allocation is made of: bytes and cost of every format of every tensor."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from tqdm import tqdm

from qat.calibrate.decoder_layers import walk_dense_layers
from qat.calibrate.fisher import Grams, OutputFisher, output_fisher
from qat.calibrate.rounding import Probe, measured_ratios
from qat.model.head import Tokens
from qat.pipelines.fit_layers import NUMBERED, OutputGrams, head_weight
from qat.pipelines.place import Place
from qat.pipelines.planned_size import PlannedSize
from qat.quant.allocate import Choice, Table
from qat.quant.output_feedback import fit_in_turns
from qat.quant.sensitivity import WeightInfo, error_cost, fit_by_moments, format_costs
from qat.quant.spec import TensorSpec
from qat.quant.targets import tied_groups
from qat.tracking.messages import say

Costs = dict[str, dict[str, float]]
GramRuns = dict[str, list[Tensor]]
PROBE_BITS = 2  # of the format, at least, that tells what rounding does


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What errors of weights cost."""

    costs: Costs
    """Of each format of each tensor, in nats per token, by parameter name."""
    grams: OutputGrams
    """G of runs of each linear's outputs, and of the embedding: see `qat.quant.output_feedback`."""


def measure_costs(
    model: nn.Module,
    candidates: Mapping[str, Sequence[TensorSpec]],
    batches: Sequence[Tokens],
    place: Place,
    further: Sequence[Tokens] = (),
    *,
    has_turns: bool = True,
) -> Sensitivity:
    """Return the cost of each format of each tensor.

    Args:
        model: The full-precision model, on the CPU; it stays as it is.
        candidates: Formats by parameter name.
        batches: Of the calibration text.
        place: Where to compute.
        further: More of it: the first tells what rounding does to text that no fit has seen, the
            rest is for the grams alone.
        has_turns: Whether the fits to come will be in turns; there are no runs otherwise.
    """
    started = time.perf_counter()
    modules = {name.removesuffix(".weight"): specs for name, specs in candidates.items()}
    body = [name for name in modules if NUMBERED.search(name)]
    device = place.device.eager()
    batches, further = (
        [batch.to(device.torch_device) for batch in some] for some in (batches, further)
    )
    unseen, *further = further or batches[:1]
    in_turns = [n for n in body if has_turns and any(spec.has_own_rows for spec in modules[n])]
    with device.hosting(model):
        sums, head = Grams.of(model, in_turns), head_weight(model, modules)
        fisher = output_fisher(model, body, batches, grams=sums)
        if further:
            sums.add_text(model, further, seed=1)
        grams = sums.of_paying_turns()
        costs, probes = walked_costs(model, modules, batches, fisher, grams, head)
        for name in modules.keys() - set(body) - {head}:
            costs |= embedding_costs(model, name, modules[name], fisher)
        ratios = measured_ratios(model, probes, unseen)
    for name, ratio in ratios.items():
        found = costs[f"{name}.weight"]
        costs[f"{name}.weight"] = {spec: ratio * cost for spec, cost in found.items()}
    say(
        f"costs of {sum(map(len, costs.values()))} formats in {time.perf_counter() - started:.0f} s"
    )
    runs = {name: [run.cpu() for run in some] for name, some in grams.items()}
    return Sensitivity(costs, OutputGrams(runs=runs, embedding=sums.embedding_mean().cpu()))


def walked_costs(
    model: nn.Module,
    modules: Mapping[str, Sequence[TensorSpec]],
    batches: Sequence[Tokens],
    fisher: OutputFisher,
    grams: GramRuns,
    head: str | None,
) -> tuple[Costs, dict[str, Probe]]:
    """Return the costs of what is passed on a walk through the model, and probes of its linears."""
    costs: Costs = {}
    probes: dict[str, Probe | None] = {}
    body, weights = list(fisher.linears), fisher.token_weights
    walk = walk_dense_layers(model, body, batches, head=head, token_weights=weights)
    with tqdm(total=len(modules), desc="costs", unit="tensor") as progress:
        for names, moment in walk:
            if list(names) == [head]:
                is_tied = model.get_submodule(head) is model.get_input_embeddings()
                moment = moment + fisher.embedding if is_tied else moment
                infos = {head: weight_info(model, head, fisher.head)}
            else:
                infos = {name: weight_info(model, name, fisher.linears[name]) for name in names}
                probes |= {
                    n: coarse_probe(infos[n], modules[n], moment, grams.get(n)) for n in names
                }
            costs |= group_costs(modules, infos, moment)
            progress.update(len(names))
    return costs, {name: probe for name, probe in probes.items() if probe}


def weight_info(model: nn.Module, name: str, row_mass: Tensor) -> WeightInfo:
    """Return a module's weight with how much errors of its outputs count, (O,)."""
    return WeightInfo(weight=model.get_submodule(name).weight.detach(), row_mass=row_mass)


def coarse_probe(
    info: WeightInfo,
    specs: Sequence[TensorSpec],
    moment: Tensor,
    grams: Sequence[Tensor] | None = None,
) -> Probe | None:
    """Return a weight in its format of fewest bits, two at least, and what that should cost.

    With the grams of its outputs they are fitted in turns, as they will be, which the cost that is
    predicted knows nothing of.
    """
    coarse = [spec for spec in specs if spec.is_quantized and not spec.is_vector]
    spec = min(coarse, key=lambda spec: (spec.bits < PROBE_BITS, spec.bits), default=None)
    if spec is None:
        return None
    weight, moment = info.weight.float(), moment.float()
    quantized = fit_by_moments(weight, spec, moment)
    cost = error_cost(quantized.dequantize() - weight, info.row_mass, moment)
    if grams and spec.has_own_rows:
        runs = weight.split(list(map(len, grams)))
        quantized = fit_in_turns(
            runs, runs, grams, lambda _rows, wanted: fit_by_moments(wanted, spec, moment)
        )
    return Probe(quantized.cpu(), cost)


def group_costs(
    modules: Mapping[str, Sequence[TensorSpec]], weights: Mapping[str, WeightInfo], moment: Tensor
) -> Costs:
    """Return the costs of weights that read the same inputs, by parameter name."""
    formats = {spec.name: spec for name in weights for spec in modules[name]}
    costs = format_costs(weights, list(formats.values()), moment)
    return {
        f"{name}.weight": {spec.name: costs[name][spec.name] for spec in modules[name]}
        for name in weights
    }


def embedding_costs(
    model: nn.Module, name: str, specs: Sequence[TensorSpec], fisher: OutputFisher
) -> Costs:
    """Return the costs of an untied embedding: its rows come as often as their tokens."""
    info = weight_info(model, name, fisher.token_shares)
    return {f"{name}.weight": format_costs({name: info}, specs, fisher.embedding)[name]}


def choice_table(
    costs: Costs, candidates: Mapping[str, Sequence[TensorSpec]], size: PlannedSize
) -> Table:
    """Return what `allocate` chooses from: bytes and cost of each format.

    Weights that must share a format stand under the first one's name.
    """
    table = {}
    for group in tied_groups(size.target, list(candidates)):
        table[group[0]] = [
            Choice(
                spec.name,
                sum(size.tensor_bytes(name, spec) for name in group),
                sum(costs[name][spec.name] for name in group),
            )
            for spec in candidates[group[0]]
            if all(spec in candidates[name] for name in group)
        ]
    return table
