"""What every pipeline that makes a student shares: measure, write, report; and what changes one."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qat.cache.read import TeacherCache
from qat.evaluate.on_cache import evaluate_on_cache
from qat.legacy.checkpoint import open_seed_checkpoint, seed_notes
from qat.legacy.fp16_snap import snap_student
from qat.legacy.student import write_seed_checkpoint
from qat.legacy.v1_to_v2 import remove_floors
from qat.model.checkpoint import (
    CheckpointHeader,
    bits_per_weight,
    dense_parts_in,
    is_checkpoint,
    read_header,
    write_checkpoint,
)
from qat.model.surgery import model_tensors, release_weights
from qat.pipelines.open_cache import open_cache
from qat.pipelines.open_checkpoint import latent_or_base_weights, open_checkpoint
from qat.pipelines.place import Place
from qat.pipelines.quantize_config import (
    SEED_SUFFIX,
    ConvertConfig,
    ConvertV1ToV2Config,
    ExactConfig,
    FitConfig,
    SnapFp16Config,
    require_other,
)
from qat.quant.hessian import NUM_SWEEPS
from qat.quant.plan import QuantPlan, plan_from_dict
from qat.quant.spec import TensorSpec
from qat.runtime.distributed import from_first, joined
from qat.runtime.launch import is_first
from qat.runtime.memory import peak_rss_bytes
from qat.storage.files import fingerprint
from qat.tracking.messages import say
from qat.tracking.record import SUMMARY, kl_name
from qat.train.run_folder import first_difference

Numbers = dict[str, float | int | None]
Change = Callable[[nn.Module, QuantPlan, Place, TeacherCache | None], tuple[QuantPlan, Numbers]]
Write = Callable[[nn.Module, CheckpointHeader, Path], None]


@dataclass(frozen=True, slots=True)
class StudentResult:
    """A student that was made, or found made."""

    checkpoint: Path
    """Native folder, or `.pt` file in the seeds' form."""
    metrics: Numbers
    """Bits per weight, seconds, peak_rss_bytes; with a cache kl_nats and what else it measures."""

    def to_json(self) -> dict[str, Any]:
        """Return the values of the closing line."""
        return {"checkpoint": str(self.checkpoint), **self.metrics}


def measure_and_write(
    model: nn.Module,
    header: CheckpointHeader,
    output: Path,
    *,
    cache: TeacherCache | None,
    write: Write,
    started: float,
    place: Place,
) -> StudentResult:
    """Measure a student on a cache if there is one, write it, return the result.

    Of several processes the first one writes.
    """
    seconds = time.perf_counter() - started
    values = bits_per_weight(model) | measure(model, cache, place)
    values |= {"seconds": round(seconds, 2), "peak_rss_bytes": peak_rss_bytes()}
    if is_first():
        write(model, replace(header, metrics=values), output)
    return StudentResult(output, values)


def change_student(
    command: str,
    config: ConvertConfig | ExactConfig,
    checkpoint: Path,
    change: Change,
    *,
    is_float16: bool = False,
) -> StudentResult:
    """Change a student in place, with its numbers before and after; write it.

    `change` returns the new plan and numbers for the result.
    """
    place = Place.of(config)
    with joined(place.device):
        return make_changed(command, config, place, checkpoint, change, is_float16)


def make_changed(
    command: str,
    config: ConvertConfig | ExactConfig,
    place: Place,
    checkpoint: Path,
    change: Change,
    is_float16: bool,
) -> StudentResult:
    """Change a student as `change_student` does, in processes that have joined."""
    started = time.perf_counter()
    opened = open_checkpoint(checkpoint, model_id=config.model_id)
    require_other("the checkpoint that is read", opened.path, config.output)
    header = opened.require_student(str(checkpoint), f"`qat {command}` takes a student")
    weights = header.base_model.get("weights")
    cache = open_cache(config.cache_dir, opened.text_folder, weights)
    made_by = recipe(command, config, student=header.sha256, cache=cache and cache.fingerprint)
    if done := from_first(partial(finished, config.output, made_by)):
        return done
    student = opened.load()
    before = measure(student, cache, place)
    plan = plan_from_dict(header.plan, model_tensors(student))
    plan, changed = change(student, plan, place, cache)
    weight_of = latent_or_base_weights(opened)

    def write(model: nn.Module, header: CheckpointHeader, output: Path) -> None:
        header.metrics.update(changed | cost(before, header.metrics))  # the result's as well
        source = opened.text_folder
        write_student(
            model, header, output, text_source=source, weight_of=weight_of, is_float16=is_float16
        )

    header = replace(header, plan=plan.to_dict(), made_by=made_by)
    return measure_and_write(
        student, header, config.output, cache=cache, write=write, started=started, place=place
    )


def convert_v1_to_v2(config: ConvertV1ToV2Config) -> StudentResult:
    """Open a student of the seeds' first form, remove the floor of its scales, measure, write."""

    def change(student: nn.Module, plan: QuantPlan, *_: object) -> tuple[QuantPlan, Numbers]:
        report = remove_floors(student).values()
        return plan.changed(TensorSpec.without_floor), report

    return change_student("convert-v1-to-v2", config, config.v1_checkpoint, change)


def snap_fp16(config: SnapFp16Config) -> StudentResult:
    """Open a student, round every stored number to float16, measure before and after, write."""

    def change(student: nn.Module, plan: QuantPlan, *_: object) -> tuple[QuantPlan, Numbers]:
        report = snap_student(student, bake=config.output.suffix == SEED_SUFFIX)
        return plan.changed(lambda spec: spec.stored_as("float16")), asdict(report)

    return change_student("snap-fp16", config, config.checkpoint, change, is_float16=True)


def cost(before: Numbers, after: Numbers) -> Numbers:
    """Return what a change did to the distance from the teacher, where it was measured."""
    name = kl_name(before)
    if name is None:
        return {}
    return {f"{name}_before": before[name], f"{name}_cost": after[name] - before[name]}


def measure(model: nn.Module, cache: TeacherCache | None, place: Place) -> Numbers:
    """Return a student's numbers on a cache, none without one; the student ends on the CPU."""
    if cache is None:
        return {}
    device, dtype = place.device, place.dtype
    with dense_parts_in(model, dtype), device.hosting(model):
        values = evaluate_on_cache(model, cache, device=device.torch_device, dtype=dtype)
        release_weights(model)
    return values


def write_student(
    model: nn.Module,
    header: CheckpointHeader,
    output: Path,
    *,
    text_source: Path,
    weight_of: Callable[[str], Tensor | None] | None = None,
    is_float16: bool = False,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Write a student as its output's name asks: the seeds' form for .pt, else a native folder.

    `weight_of` gives the weight that a layer was fitted to, for a form that keeps it; `tensors` are
    what the native file holds, where they are at hand.
    """
    if output.suffix == SEED_SUFFIX:
        names = ("base_model", "cache_fingerprint", "made_by", "metrics")
        write_seed_checkpoint(
            model,
            output,
            model_id=header.base_model["path"],
            weight_of=weight_of,
            notes={name: getattr(header, name) for name in names},
            is_float16=is_float16,
        )
        return
    notes = {SUMMARY: header.metrics}  # so that `qat compare` shows it among the runs
    write_checkpoint(model, header, output, text_source=text_source, tensors=tensors, notes=notes)


def recipe(command: str, config: FitConfig | ExactConfig, **identity: str | None) -> dict[str, Any]:
    """Return what decides a student to the bit: settings and the identity of what was read.

    Paths and devices do not decide; contents do. Students made before `sweeps` and `turns` were
    settings took the usual number and none, and are found.
    """
    skipped = {"output", "device", "model", "model_id", "cache_dir", "q4_rank"}
    skipped |= {name for name in asdict(config) if name.endswith("checkpoint")}
    settings = {k: v for k, v in asdict(config).items() if k not in skipped}
    if settings.get("sweeps") == NUM_SWEEPS:
        del settings["sweeps"]
    if settings.get("turns") is False:
        del settings["turns"]
    return {"command": command, "settings": settings, "read": identity}


def finished(output: Path, made_by: dict[str, Any]) -> StudentResult | None:
    """Return the student that the same recipe has made already, None for none."""
    if is_checkpoint(output):
        header = read_header(output)
        previous, metrics = header.made_by, header.metrics
    elif output.is_file() and output.suffix == SEED_SUFFIX:
        try:
            notes = seed_notes(open_seed_checkpoint(output))
        except ValueError as error:
            raise FileExistsError(f"--output {output} is there: {error}") from error
        previous, metrics = notes.get("made_by", {}), notes.get("metrics", {})
    elif output.exists() and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"--output {output} exists and is no student; choose another name")
    else:
        return None
    if fingerprint(previous) == fingerprint(made_by):
        say(f"{output} is already complete: nothing to do")
        return StudentResult(output, metrics)
    name, old, new = first_difference(previous, made_by)
    difference = f"{name} {old} there, {new} here" if name else "settings not recorded there"
    raise FileExistsError(
        f"--output {output} holds a student that was made otherwise "
        f"({difference}); choose another --output, or remove it"
    )
