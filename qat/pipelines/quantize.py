"""A full-precision model to a student: every weight of a plan fitted, measured, written."""

import time
from functools import partial

import torch
from torch import Tensor, nn

from qat.cache.read import TeacherCache
from qat.calibrate.statistics import collect_loss_weights, collect_second_moments
from qat.model.checkpoint import CheckpointHeader
from qat.model.head import Tokens
from qat.model.layers import FakeQuantLinear
from qat.model.load import (
    base_weights,
    load_dense,
    model_folder,
    model_identity,
    vocabulary_size,
)
from qat.model.surgery import dense_weights, model_tensors
from qat.pipelines.fit_layers import (
    NUMBERED,
    FitTask,
    fit_by_decoder_layers,
    fit_with_moments,
    head_weight,
    token_frequencies,
)
from qat.pipelines.quantize_config import CALIBRATION_BATCH, Fit, InitStudentConfig
from qat.pipelines.recipe import finished, recipe
from qat.pipelines.students import (
    StudentResult,
    already_made,
    measure_and_write,
    open_cache,
    write_student,
)
from qat.quant.plan import QuantPlan, read_plan
from qat.runtime.device import Device
from qat.tracking.messages import say

LINEARS = (nn.Linear, FakeQuantLinear)


def quantize(config: InitStudentConfig) -> StudentResult:
    """Load a model, calibrate, fit every weight of the plan, measure, write.

    Raises:
        ValueError: If the plan does not fit the model, or the cache is of another teacher.
        FileNotFoundError: If the model or the cache is not there.
    """
    started = time.perf_counter()
    device = Device.detect(config.device)
    dtype = device.dtype_from_name(config.dtype)
    say(device.describe())
    base, folder = model_identity(config.model), model_folder(config.model)
    cache = open_cache(config.cache_dir, folder, vocabulary_size(folder), base["weights"])
    made_by = recipe(
        "init-student", config, base=base["weights"], cache=cache and cache.fingerprint
    )
    done = finished(config.output, made_by)
    if done is not None:
        return already_made(config.output, done)
    model = load_dense(config.model, dtype=dtype)
    plan = read_plan(config.plan, model_tensors(model))
    say(f"plan {plan.name}: {len(plan.quantized)} weights of {base['name']}")
    count = config.num_calibration_sequences(cache.seq_len) if cache is not None else 0
    quantize_model(
        model,
        plan,
        fit=config.fit,
        cache=cache,
        num_sequences=count,
        device=device,
        dtype=dtype,
    )
    header = CheckpointHeader(
        plan=plan.to_dict(),
        base_model={"path": config.model, **base},
        cache_fingerprint=cache and cache.fingerprint,
        made_by=made_by,
    )
    return measure_and_write(
        model,
        header,
        config.output,
        cache=cache if config.eval else None,
        write=partial(
            write_student, text_source=folder, weight_of=base_weights(config.model, base)
        ),
        started=started,
        device=device,
        dtype=dtype,
    )


def quantize_model(
    model: nn.Module,
    plan: QuantPlan,
    *,
    fit: Fit = "hessian",
    cache: TeacherCache | None = None,
    num_sequences: int = 0,
    device: Device,
    dtype: torch.dtype,
) -> None:
    """Turn a full-precision model into a student in place.

    Args:
        model: Causal LM on the CPU.
        plan: The format of every tensor.
        fit: As in `InitStudentConfig.fit`.
        cache: Its first training sequences calibrate; None counts every weight alike.
        num_sequences: How many of them.
        device: Where it is done.
        dtype: Compute dtype, that of the model.
    """
    dense_weights(model, plan)  # refuses a plan that quantizes nothing
    task = FitTask(
        specs=plan.quantized,
        # Asked of the model, so that no original module outlives its fit.
        weight_of=lambda name: model.get_submodule(name).weight,
        row_weights=row_weights(model, plan, cache, num_sequences),
    )
    task.check()
    fit_on_device(
        model,
        task,
        fit=fit,
        cache=cache,
        count=num_sequences,
        device=device,
        dtype=dtype,
    )


def row_weights(
    model: nn.Module, plan: QuantPlan, cache: TeacherCache | None, count: int
) -> dict[str, Tensor]:
    """Return the frequencies of an embedding's tokens by its name; empty where it stays dense."""
    names = {module: name for name, module in model.named_modules()}
    name = names[model.get_input_embeddings()]
    if name not in plan.quantized or cache is None:
        return {}
    vocab_size = plan.shapes[f"{name}.weight"][0]
    token_ids = [batch.token_ids for batch in calibration_batches(cache, count)]
    return {name: token_frequencies(token_ids, vocab_size)}


def fit_on_device(
    model: nn.Module,
    task: FitTask,
    *,
    fit: Fit,
    cache: TeacherCache | None,
    count: int,
    device: Device,
    dtype: torch.dtype,
    reference: nn.Module | None = None,
) -> None:
    """Fit a task's weights on a device, by the method asked for.

    Args:
        model: Gets the layers; on the CPU before and after.
        task: What is fitted.
        fit: The method.
        cache: Calibrates; None counts every weight alike.
        count: Sequences of it.
        device: Where it is done.
        dtype: Compute dtype.
        reference: The full-precision model where `model` is a student.
    """
    if fit == "moments" or cache is None:
        fit_with_moments(
            model, task, second_moments(reference or model, task, cache, count, device)
        )
        return
    place = device.eager()
    batches = [batch.to(place.torch_device) for batch in calibration_batches(cache, count)]
    if reference is not None:
        place.place(reference)
    with place.hosting(model):
        source = reference or model
        names = [name for name in task.specs if NUMBERED.search(name)]
        weights = collect_loss_weights(source, names, batches) if fit == "guided" else None
        fit_by_decoder_layers(
            model, task, batches, reference=reference, token_weights=weights, dtype=dtype
        )


def second_moments(
    model: nn.Module, task: FitTask, cache: TeacherCache | None, count: int, device: Device
) -> dict[str, Tensor] | None:
    """Return the second moments of each weight's inputs on a cache; None without one."""
    if cache is None:
        say("no --cache-dir: every weight counts alike, which costs most of a 2-bit student")
        return None
    head = head_weight(model, task.specs)
    linears = {
        name: module
        for name in task.specs
        if name != head and isinstance(module := model.get_submodule(name), LINEARS)
    }
    batches = (batch.to(device.torch_device) for batch in calibration_batches(cache, count))
    with device.hosting(model):
        moments = collect_second_moments(model, linears, batches, head=head)
    return {name: moment.cpu() for name, moment in moments.items()}


def calibration_batches(cache: TeacherCache, count: int) -> list[Tokens]:
    """Return the first `count` training sequences as the teacher read them, in batches."""
    chosen = cache.sequence_ids("train")[:count]
    starts = range(0, len(chosen), CALIBRATION_BATCH)
    batches = (cache.batch(chosen[start : start + CALIBRATION_BATCH]) for start in starts)
    return [Tokens(batch.input_ids, batch.document_ids) for batch in batches]
