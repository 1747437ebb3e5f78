"""The table that an allocation is made of: bytes and cost of every format of every tensor."""

import time
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from tqdm import tqdm

from qat.calibrate.decoder_layers import walk_dense_layers
from qat.calibrate.fisher import OutputFisher, output_fisher
from qat.model.head import Tokens
from qat.pipelines.fit_layers import NUMBERED, head_weight
from qat.pipelines.place import Place
from qat.pipelines.planned_size import PlannedSize
from qat.quant.allocate import Choice, Table
from qat.quant.sensitivity import WeightInfo, format_costs
from qat.quant.spec import TensorSpec
from qat.quant.targets import tied_groups
from qat.tracking.messages import say

Costs = dict[str, dict[str, float]]


def measure_costs(
    model: nn.Module,
    candidates: Mapping[str, Sequence[TensorSpec]],
    batches: Sequence[Tokens],
    place: Place,
) -> Costs:
    """Return the cost of each format of each tensor, in nats per token, by parameter name.

    Args:
        model: The full-precision model, on the CPU; it stays as it is.
        candidates: Formats by parameter name.
        batches: Of the calibration text.
        place: Where to compute.
    """
    started = time.perf_counter()
    modules = {name.removesuffix(".weight"): specs for name, specs in candidates.items()}
    body = [name for name in modules if NUMBERED.search(name)]
    device = place.device.eager()
    batches = [batch.to(device.torch_device) for batch in batches]
    with device.hosting(model):
        fisher, head = output_fisher(model, body, batches), head_weight(model, modules)
        walk = walk_dense_layers(
            model, body, batches, head=head, token_weights=fisher.token_weights
        )
        costs: Costs = {}
        with tqdm(total=len(modules), desc="costs", unit="tensor") as progress:
            for names, moment in walk:
                for name, found in group_costs(model, modules, names, moment, fisher, head).items():
                    costs[f"{name}.weight"] = found
                    progress.update()
            for name in modules.keys() - set(body) - {head}:
                costs |= embedding_costs(model, name, modules[name], fisher)
                progress.update()
    say(
        f"costs of {sum(map(len, costs.values()))} formats in {time.perf_counter() - started:.0f} s"
    )
    return costs


def group_costs(
    model: nn.Module,
    modules: Mapping[str, Sequence[TensorSpec]],
    names: Sequence[str],
    moment: Tensor,
    fisher: OutputFisher,
    head: str | None,
) -> Costs:
    """Return the costs of weights that read the same inputs, by module name."""
    if list(names) == [head]:
        is_tied = model.get_submodule(head) is model.get_input_embeddings()
        moment = moment + fisher.embedding if is_tied else moment
        masses = {head: fisher.head}
    else:
        masses = {name: fisher.linears[name] for name in names}
    weights = {
        name: WeightInfo(weight=model.get_submodule(name).weight.detach(), row_mass=masses[name])
        for name in names
    }
    formats = {spec.name: spec for name in names for spec in modules[name]}
    costs = format_costs(weights, list(formats.values()), moment)
    return {name: {spec.name: costs[name][spec.name] for spec in modules[name]} for name in names}


def embedding_costs(
    model: nn.Module, name: str, specs: Sequence[TensorSpec], fisher: OutputFisher
) -> Costs:
    """Return the costs of an untied embedding: its rows come as often as their tokens."""
    weight = model.get_submodule(name).weight.detach()
    info = WeightInfo(weight=weight, row_mass=fisher.token_shares)
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
