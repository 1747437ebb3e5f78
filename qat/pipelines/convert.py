"""Students to other formats: layers whose format changes are fitted anew, the others kept.

`convert` fits to the weight that the student computes, for students whose grid a runtime lacks; one
that is trained on the runtime's grid loses nothing. `convert_q4_to_q2` fits MLP layers of a 4-bit
student to its latent or full-precision weights and keeps attention to the bit, unless it is to have
another codebook size, or scales of another form than it can be widened to.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from qat.cache.read import TeacherCache
from qat.model.checkpoint import CheckpointHeader, dense_parts_in
from qat.model.layers import FakeQuantLinear
from qat.model.load import load_dense, model_identity
from qat.model.rankwise import low_rank_factors, widen
from qat.model.surgery import layers_of_kind, model_tensors, quantized_layers, swap
from qat.pipelines import students
from qat.pipelines.fit_layers import FitTask
from qat.pipelines.open_cache import open_cache
from qat.pipelines.open_checkpoint import Checkpoint, latent_or_base_weights, open_checkpoint
from qat.pipelines.place import Place
from qat.pipelines.quantize import calibration_batches, fit_on_device
from qat.pipelines.quantize_config import (
    SEED_ATTENTION_RANK,
    ConvertConfig,
    ConvertQ4ToQ2Config,
    FitConfig,
    bits_of_size,
    require_other,
)
from qat.quant.plan import QuantPlan, int_spec, kind_specs, plan_from_dict, read_plan, tensor_kind
from qat.quant.spec import TensorSpec, make_spec
from qat.tracking.messages import say

WeightOf = Callable[[str], Tensor | None]


def convert(config: ConvertConfig) -> students.StudentResult:
    """Open a student, fit what changes, measure before and after, write."""

    def refit(
        student: nn.Module, _plan: QuantPlan, place: Place, cache: TeacherCache | None
    ) -> tuple[QuantPlan, students.Numbers]:
        expected = read_plan(config.plan, model_tensors(student))
        specs = layers_to_change(student, expected)
        own_weight = weights_to_fit(student, lambda _name: None)
        fit_student(student, specs, own_weight, config, cache, place)
        sqnr = weight_sqnr_db(student, list(specs), own_weight)
        return expected, {"layers_changed": len(specs), "weight_sqnr_db": sqnr}

    return students.change_student("convert", config, config.checkpoint, refit)


def fit_student(
    student: nn.Module,
    specs: Mapping[str, TensorSpec],
    weight_of: Callable[[str], Tensor],
    config: FitConfig,
    cache: TeacherCache | None,
    place: Place,
    base: str | None = None,
) -> None:
    """Fit the layers of `specs` to the weights of `weight_of`, in place.

    Errors of earlier layers are measured against the full-precision model at `base`; without one
    the student is its own reference.
    """
    task = FitTask(specs=specs, weight_of=weight_of, row_weights={})
    task.check()
    reference = None
    if base is not None:
        reference = load_base(base, place.dtype)
        matching_layers(reference or student, student, specs)
    with dense_parts_in(student, place.dtype):
        batches = calibration_batches(cache, config)
        fit_on_device(student, task, config, batches, place, reference)


def layers_to_change(student: nn.Module, expected: QuantPlan) -> dict[str, TensorSpec]:
    """Return the expected format of each layer that has another, by name, in the model's order."""
    layers = quantized_layers(student)
    for name in expected.quantized:
        if name not in layers:
            raise ValueError(f"{name} is dense in this student; `qat init-student` quantizes it")
    for name in layers:
        if name not in expected.quantized:
            raise ValueError(f"plan {expected.name} leaves {name} dense, which is quantized here")
    changing = {
        name: expected.quantized[name]
        for name, layer in layers.items()
        if layer.spec != expected.quantized[name]
    }
    if not changing:
        raise ValueError(f"every layer is of plan {expected.name} already; export the student")
    return changing


@torch.no_grad()
def weight_sqnr_db(
    student: nn.Module, names: Iterable[str], previous: Callable[[str], Tensor]
) -> float:
    """Return how much stronger the previous weights are than what a conversion changed, in dB.

    Args:
        student: After the conversion.
        names: Of the layers that changed.
        previous: Returns a layer's weight before, (O, I).
    """
    power = noise = 0.0
    for name in names:
        before = previous(name).cpu().double()  # a fit on another device may have left it there
        change = student.get_submodule(name).fake_quantized_weight().cpu().double() - before
        power += float(before.square().sum())
        noise += float(change.square().sum())
    return round(10 * math.log10(power / max(noise, 1e-300)), 2)


def weights_to_fit(student: nn.Module, weight_of: WeightOf) -> Callable[[str], Tensor]:
    """Return a function from a layer's name to the weight to fit: the given one, else its own."""
    layers = quantized_layers(student)

    def weight(name: str) -> Tensor:
        given = weight_of(name)
        return layers[name].fake_quantized_weight().detach() if given is None else given

    return weight


def convert_q4_to_q2(config: ConvertQ4ToQ2Config) -> students.StudentResult:
    """Open a 4-bit student, fit its MLP layers anew, measure, write."""
    started = time.perf_counter()
    place = Place.of(config)
    opened = open_checkpoint(config.q4_checkpoint, model_id=config.model_id)
    require_other("--q4-checkpoint", opened.path, config.output)
    header = opened.require_student(
        f"--q4-checkpoint {config.q4_checkpoint}", "`qat init-student` makes a 4-bit student of it"
    )
    previous = kind_specs(header.plan)
    rank = spec.rank if (spec := previous.get("attention")) else 0
    if config.q4_rank not in (None, rank):
        say(f"--q4-rank {config.q4_rank}: the checkpoint's attention scales have rank {rank}")
    base = base_of(config, header)
    cache = open_cache(config.cache_dir, opened.text_folder, base["weights"])
    fingerprint = cache and cache.fingerprint
    read = {"q4": header.sha256, "base": base["weights"], "cache": fingerprint}
    made_by = students.recipe("convert-q4-to-q2", config, **read)
    q2_specs(previous, config)  # refuses what cannot be, before long work
    if done := students.finished(config.output, made_by):
        return done
    weight_of = latent_or_base_weights(opened, base)
    student, plan = fit_q2(config, opened, weight_of, base["path"], cache, place)
    header = replace(
        header, plan=plan.to_dict(), base_model=base, cache_fingerprint=fingerprint, made_by=made_by
    )
    return students.measure_and_write(
        student,
        header,
        config.output,
        cache=cache if config.eval else None,
        write=partial(students.write_student, text_source=opened.text_folder, weight_of=weight_of),
        started=started,
        place=place,
    )


def base_of(config: ConvertQ4ToQ2Config, header: CheckpointHeader) -> dict[str, str]:
    """Return path, name and hash of the full-precision model; what is known of one gone."""
    path = config.model_id or header.base_model["path"]
    try:
        found = {"path": path, **model_identity(path)}
    except FileNotFoundError:
        if config.model_id is not None:
            raise
        return header.base_model
    made_from = header.base_model.get("weights", found["weights"])
    if config.model_id is None and found["weights"] != made_from:
        raise ValueError(
            f"{path} holds other weights than {config.q4_checkpoint} was made from; "
            "give its full-precision model with --model-id"
        )
    return found


def fit_q2(
    config: ConvertQ4ToQ2Config,
    opened: Checkpoint,
    weight_of: WeightOf,
    base: str,
    cache: TeacherCache | None,
    place: Place,
) -> tuple[nn.Module, QuantPlan]:
    """Return the converted student, on the CPU, and its plan."""
    student = opened.load()
    plan = plan_from_dict(opened.header.plan, model_tensors(student))
    kinds = {kind: plan.spec_of_kind(kind) for kind in ("mlp", "attention")}
    specs = q2_specs(kinds, config)
    layers = {
        name: kind for name in quantized_layers(student) if (kind := tensor_kind(name)) in specs
    }
    fitted = {
        name: specs[kind]
        for name, kind in layers.items()
        if kind == "mlp" or not is_kept(kinds[kind], specs[kind])
    }
    weight_of = weights_to_fit(student, weight_of)
    fit_student(student, fitted, weight_of, config, cache, place, base)
    widen_attention(student, specs["attention"])
    changed = {name: specs[kind] for name, kind in layers.items()}
    return student, plan.with_specs(changed, name=q2_name(specs, config))


def q2_specs(
    previous: Mapping[str, TensorSpec | None], config: ConvertQ4ToQ2Config
) -> dict[str, TensorSpec]:
    """Return the formats of MLP and attention after the conversion."""
    several = [kind for kind in ("mlp", "attention") if previous.get(kind) is None]
    if several:
        raise ValueError(
            f"{config.q4_checkpoint} has no single format for its {several[0]} layers; "
            "use `qat convert --plan` instead"
        )
    bits, rank, codebook = config.mlp_bits, config.mlp_rank, config.q2_mlp_codebook
    start = int_spec(bits) if codebook == "int" else make_spec(bits, codebook=codebook)
    group_size = config.q2_mlp_group_size
    if group_size is None:
        group_size = start.group_size
    attention = attention_spec(previous["attention"], config)
    if config.is_seed_form and attention.floor is not None:
        raise ValueError(
            f"--output {config.output} cannot hold {config.q4_checkpoint}'s floored scales; "
            "run `qat convert-v1-to-v2` on it first, or name a folder"
        )
    mlp = make_spec(bits, group_size=group_size, rank=rank, codebook=codebook)
    return {"mlp": mlp, "attention": attention}


def q2_name(specs: Mapping[str, TensorSpec], config: ConvertQ4ToQ2Config) -> str:
    """Return the name of the plan after the conversion."""
    mlp, codebook = specs["mlp"], config.q2_mlp_codebook
    size = f"r{mlp.rank}" if mlp.rank else f"g{mlp.group_size}"
    kind = "" if codebook == "learned" else f"_{codebook}"
    return f"q{mlp.bits}a{specs['attention'].bits}{kind}_{size}"


def attention_spec(previous: TensorSpec, config: ConvertQ4ToQ2Config) -> TensorSpec:
    """Return the format of attention layers after the conversion."""
    size, rank = config.q2_attn_lut_size, config.q2_attn_rank
    bits = previous.bits if size is None else bits_of_size("--q2-attn-lut-size", size)
    if rank is None:
        least = SEED_ATTENTION_RANK if config.is_seed_form and previous.rank else 0
        rank = max(previous.rank, least)
    if bits == previous.bits and (rank == previous.rank or 0 < previous.rank < rank):
        return previous.with_rank(rank)
    return make_spec(bits, group_size=previous.group_size or 32, rank=rank)


def is_kept(previous: TensorSpec, spec: TensorSpec) -> bool:
    """Return whether layers keep their weights to the bit: as they are, or with a larger rank."""
    return previous == spec or (
        0 < previous.rank < spec.rank and previous.with_rank(spec.rank) == spec
    )


def matching_layers(model: nn.Module, student: nn.Module, names: Iterable[str]) -> None:
    """Refuse a full-precision model that is not the one of a student's layers."""
    found, layers = dict(model.named_modules()), quantized_layers(student)
    for name in names:
        expected = (layers[name].out_features, layers[name].in_features)
        module = found.get(name)
        sizes = module and (module.out_features, module.in_features)
        if sizes != expected:
            raise ValueError(
                f"{name} has shape {expected} in the student and {sizes or 'no match'} in the "
                "full-precision model; give the model it was made from with --model-id"
            )


@torch.no_grad()
def widen_attention(student: nn.Module, spec: TensorSpec) -> None:
    """Give attention layers of a smaller rank the format's, in place; no weight changes."""
    for name, layer in layers_of_kind(student, "attention").items():
        if 0 < layer.spec.rank < spec.rank:
            wider = FakeQuantLinear(
                layer.in_features, layer.out_features, layer.spec.with_rank(spec.rank)
            )
            for part, factor in widen(low_rank_factors(layer), spec.rank)._asdict().items():
                getattr(wider, part).data = factor
            wider.codebook.data, wider.indices = layer.codebook.data, layer.indices
            wider.bias = layer.bias
            swap(student, name, wider.requires_grad_(False))


def load_base(path: str, dtype: torch.dtype) -> nn.Module | None:
    """Return the full-precision model at a path, None where it is gone."""
    try:
        return load_dense(path, dtype=dtype)
    except FileNotFoundError:
        say(f"no full-precision model at {path}: fitting to the student's own weights")
        return None
