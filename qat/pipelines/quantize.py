"""A full-precision model to a student: every weight of a plan fitted, measured, written."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from qat.cache.read import TeacherCache
from qat.calibrate.fisher import Grams
from qat.calibrate.statistics import collect_second_moments
from qat.model.checkpoint import CheckpointHeader, HeldTensors, empty_student, fill
from qat.model.head import Tokens
from qat.model.layered import LayeredModel, NeedsWhole, open_layered
from qat.model.layers import FakeQuantLinear
from qat.model.load import base_weights, load_dense, model_folder, model_identity
from qat.model.surgery import dense_weights, model_tensors
from qat.pipelines import fit_layers, students
from qat.pipelines.open_cache import open_cache
from qat.pipelines.place import Place
from qat.pipelines.quantize_config import (
    CALIBRATION_BATCH,
    SEED_SUFFIX,
    FitConfig,
    InitStudentConfig,
)
from qat.pipelines.quantize_layered import fit_layered, fit_layered_against
from qat.quant.hessian import NUM_SWEEPS
from qat.quant.plan import QuantPlan, read_plan
from qat.runtime.device import Device, is_traced
from qat.runtime.distributed import from_first, joined, share
from qat.runtime.launch import num_processes
from qat.runtime.memory import host_bytes
from qat.tracking.messages import say

LINEARS = (nn.Linear, FakeQuantLinear)
WHOLE_SHARE = 0.25  # of the host's memory, for a model whose layers' gradients are taken as well
GRAM_TOKENS = 12288  # that gradients are taken on, or a quarter of the text
NO_CACHE = "no --cache-dir: every weight counts alike, which costs most of a 2-bit student"


def quantize(
    config: InitStudentConfig, grams: Callable[[], fit_layers.OutputGrams] | None = None
) -> students.StudentResult:
    """Load a model, calibrate, fit every weight of the plan, measure, write.

    Processes that torchrun started read a part of the text each, and fit alike. `grams` gives those
    of `FitTask` where they are known; they are measured when not given.
    """
    place = Place.of(config)
    with joined(place.device):
        return make_student(config, place, grams)


def make_student(
    config: InitStudentConfig, place: Place, grams: Callable[[], fit_layers.OutputGrams] | None
) -> students.StudentResult:
    """Make a student as `quantize` does, in processes that have joined."""
    started = time.perf_counter()
    base, folder = model_identity(config.model), model_folder(config.model)
    cache = open_cache(config.cache_dir, folder, base["weights"])
    fingerprint = cache and cache.fingerprint
    made_by = students.recipe("init-student", config, base=base["weights"], cache=fingerprint)
    if done := from_first(partial(students.finished, config.output, made_by)):
        return done
    fitted = fit_student(config, cache, place, grams)
    header = CheckpointHeader(
        plan=fitted.plan.to_dict(),
        base_model={"path": config.model, **base},
        cache_fingerprint=fingerprint,
        made_by=made_by,
    )
    cache = cache if config.eval else None
    needs_values = cache is not None or config.output.suffix == SEED_SUFFIX
    return students.measure_and_write(
        fitted.with_values(folder, place) if needs_values else fitted.model,
        header,
        config.output,
        cache=cache,
        write=partial(
            students.write_student,
            text_source=folder,
            weight_of=base_weights(config.model, base),
            tensors=fitted.tensors,
        ),
        started=started,
        place=place,
    )


@dataclass(frozen=True, slots=True)
class Fitted:
    """A student that was made."""

    plan: QuantPlan
    model: nn.Module
    tensors: dict[str, Tensor] | None = None
    """What its file holds, where its quantized weights in `model` have sizes only."""

    def with_values(self, folder: Path, place: Place) -> nn.Module:
        """Return the student, of the model in a folder, with values of all weights."""
        if self.tensors is None:
            return self.model
        student = empty_student(folder, lambda _tensors: self.plan, place.dtype)
        fill(student, HeldTensors(self.tensors), place.dtype)
        return student.eval().requires_grad_(False)


def fit_student(
    config: InitStudentConfig,
    cache: TeacherCache | None,
    place: Place,
    grams: Callable[[], fit_layers.OutputGrams] | None,
) -> Fitted:
    """Fit a model to the plan: layer by layer where the fit lets that, else in memory as a whole.

    Turns need gradients through all of it: where it is too large for that, there are none.
    """
    if not is_traced(place.device.torch_device):
        is_one_pass = config.fit == "moments" or cache is None
        try:
            layered = open_layered(config.model, place.dtype)
            if is_one_pass or (grams is None and (not config.turns or is_large(layered))):
                return fit_from_files(layered, config, cache, place)
        except NeedsWhole as why:
            say(f"{why}: the model is loaded as a whole")
    model = load_dense(config.model, dtype=place.dtype)
    plan = read_plan(config.plan, model_tensors(model))
    known = grams() if grams and config.fit == "hessian" else None
    quantize_model(model, plan, config, cache, place, num_sweeps=config.sweeps, grams=known)
    return Fitted(plan, model)


def is_large(layered: LayeredModel) -> bool:
    """Whether a model takes so much of the host's memory that it is better not there as a whole."""
    count = sum(tensor.numel() for tensor in layered.tensors().values())
    needed = count * layered.dtype.itemsize
    if needed <= WHOLE_SHARE * host_bytes():
        return False
    say(f"{needed / 1e9:.1f} GB of weights are fitted layer by layer, without --turns")
    return True


def fit_from_files(
    layered: LayeredModel, config: InitStudentConfig, cache: TeacherCache | None, place: Place
) -> Fitted:
    """Fit a model with one decoder layer in memory at a time."""
    plan = read_plan(config.plan, model_tensors(layered.model))
    dense_weights(layered.model, plan)  # refuses a plan that quantizes nothing
    batches = calibration_batches(cache, config)
    if not batches:
        say(NO_CACHE)
    rows = row_weights(layered.model, plan, batches)
    if config.fit == "hessian" and batches:
        sweeps = config.sweeps
        tensors = fit_layered_against(layered, plan, batches, rows, place.device, sweeps)
    else:
        tensors = fit_layered(layered, plan, batches, rows, place.device)
    return Fitted(plan, layered.model, tensors)


def quantize_model(
    model: nn.Module,
    plan: QuantPlan,
    config: FitConfig,
    cache: TeacherCache | None,
    place: Place,
    *,
    num_sweeps: int = NUM_SWEEPS,
    grams: fit_layers.OutputGrams | None = None,
) -> None:
    """Turn a full-precision model on the CPU into a student in place."""
    dense_weights(model, plan)  # refuses a plan that quantizes nothing
    batches = calibration_batches(cache, config)
    task = fit_layers.FitTask(
        specs=plan.quantized,
        # Asked of the model, so that no original module outlives its fit.
        weight_of=lambda name: model.get_submodule(name).weight,
        row_weights=row_weights(model, plan, batches),
        num_sweeps=num_sweeps,
        grams=grams or fit_layers.OutputGrams(),
    )
    task.check()
    fit_on_device(model, task, config, batches, place)


def row_weights(model: nn.Module, plan: QuantPlan, batches: list[Tokens]) -> dict[str, Tensor]:
    """Return the frequencies of an embedding's tokens by its name; empty where it stays dense."""
    names = {module: name for name, module in model.named_modules()}
    name = names[model.get_input_embeddings()]
    if name not in plan.quantized or not batches:
        return {}
    vocab_size = plan.shapes[f"{name}.weight"][0]
    return {name: fit_layers.token_frequencies([batch.token_ids for batch in batches], vocab_size)}


def fit_on_device(
    model: nn.Module,
    task: fit_layers.FitTask,
    config: FitConfig,
    batches: list[Tokens],
    place: Place,
    reference: nn.Module | None = None,
) -> None:
    """Fit a task's weights on a device, by the method that the config names.

    The model is on the CPU before and after. Without batches every weight counts alike; `reference`
    is the full-precision model where `model` is a student.
    """
    if config.fit == "moments" or not batches:
        moments = second_moments(reference or model, task, batches, place.device)
        fit_layers.fit_with_moments(model, task, moments)
        return
    device = place.device.eager()
    batches = [batch.to(device.torch_device) for batch in batches]
    if reference is not None:
        device.place(reference)
    with device.hosting(model):
        if config.turns and task.grams.embedding is None:
            task = replace(task, grams=gradient_grams(reference or model, task, batches))
        fit_layers.fit_by_decoder_layers(
            model, task, batches, reference=reference, dtype=place.dtype
        )


def gradient_grams(
    model: nn.Module, task: fit_layers.FitTask, batches: list[Tokens]
) -> fit_layers.OutputGrams:
    """Return G of decoder layers' outputs where turns pay, and of the embedding, on some text."""
    started = time.perf_counter()
    body = {name: spec for name, spec in task.specs.items() if fit_layers.NUMBERED.search(name)}
    grams = Grams.of(model, [name for name, spec in body.items() if spec.has_own_rows])
    if not grams.sizes:
        return fit_layers.OutputGrams()
    most = GRAM_TOKENS // num_processes()
    count = min(most // batches[0].token_ids.numel(), len(batches) // 4)
    grams.add_text(model, batches[:: -(-len(batches) // max(1, count))])
    say(f"gradients of {len(grams.sizes)} linears in {time.perf_counter() - started:.0f} s")
    return fit_layers.OutputGrams(runs=grams.of_paying_turns(), embedding=grams.embedding_mean())


def second_moments(
    model: nn.Module, task: fit_layers.FitTask, batches: list[Tokens], device: Device
) -> dict[str, Tensor] | None:
    """Return the second moments of each weight's inputs on a text; None without one."""
    if not batches:
        say(NO_CACHE)
        return None
    head = fit_layers.head_weight(model, task.specs)
    linears = {
        name: module
        for name in task.specs
        if name != head and isinstance(module := model.get_submodule(name), LINEARS)
    }
    with device.hosting(model):
        placed = (batch.to(device.torch_device) for batch in batches)
        moments = collect_second_moments(model, linears, placed, head=head)
    return {name: moment.cpu() for name, moment in moments.items()}


def calibration_batches(cache: TeacherCache | None, config: FitConfig) -> list[Tokens]:
    """Return the sequences that calibrate, as the teacher reads them; none without a cache."""
    if cache is None:
        return []
    return spread_batches(cache, config.num_calibration_sequences(cache.seq_len))


def spread_batches(cache: TeacherCache, count: int) -> list[Tokens]:
    """Return so many sequences, spread over all text that is not held out, in batches.

    Processes that work together take a part each.

    Raises:
        ValueError: If there are fewer sequences than processes.
    """
    ids, documents = cache.spread_text(count)
    own = list(share(range(len(ids))))
    if not own:
        raise ValueError(
            f"{len(ids)} sequences calibrate in {num_processes()} processes; start fewer, or give "
            "more text"
        )
    ids, documents = ids[own], None if documents is None else documents[own]
    parts = ids.split(CALIBRATION_BATCH)
    if documents is None:
        return [Tokens(part) for part in parts]
    return [Tokens(*pair) for pair in zip(parts, documents.split(CALIBRATION_BATCH), strict=True)]
