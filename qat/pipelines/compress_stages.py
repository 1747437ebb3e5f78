"""What making a file consists of: teacher cache, costs, fit, training, export, measurement.

Each part leaves its result in a work folder and finds it there again. Of several processes the
first one decides what is there, writes it, and its clock counts.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat.cache.config import BuildCacheConfig
from qat.cache.read import TeacherCache
from qat.calibrate.rounding import PROBE_KL
from qat.data.text import bos_id, text_blocks
from qat.evaluate.on_cache import evaluate_on_cache
from qat.evaluate.on_text import evaluate_on_text
from qat.export.config import ExportConfig
from qat.export.from_gguf import read_gguf_model
from qat.model.checkpoint import dense_parts_in, empty_model
from qat.model.load import load_dense, load_tokenizer, model_folder, model_identity
from qat.pipelines.build_cache import build_cache
from qat.pipelines.compress_config import SourceConfig
from qat.pipelines.export import export
from qat.pipelines.fit_layers import OutputGrams
from qat.pipelines.open_cache import open_cache
from qat.pipelines.open_checkpoint import open_checkpoint
from qat.pipelines.place import Place
from qat.pipelines.planned_size import PlannedSize
from qat.pipelines.quantize import GRAM_TOKENS, quantize, spread_batches
from qat.pipelines.quantize_config import CALIBRATION_BATCH, CALIBRATION_TOKENS, InitStudentConfig
from qat.pipelines.sensitivity import Costs, choice_table, measure_costs
from qat.pipelines.step_time import rehearse_training
from qat.pipelines.train import train
from qat.quant.allocate import Allocation, Table
from qat.quant.spec import TensorSpec
from qat.quant.targets import candidates
from qat.runtime.distributed import from_first
from qat.runtime.launch import is_first, num_processes
from qat.runtime.memory import host_bytes
from qat.storage.decode import Count, Sha256, as_type, read_as, reading
from qat.storage.files import atomic_file, fingerprint, sha256_of_file, write_json
from qat.tracking.messages import say
from qat.train.config import IntervalsConfig, OptimConfig, TrainConfig

CACHE_SHARE = 1 / 30  # of the minutes: as much text as training then reads about twice
FIT_PASSES = 4.3  # a fit goes over a token in what the teacher takes for so many
MOST_CALIBRATION_TOKENS = 262144  # of a fit
MEMORY_STEP = 8192  # tokens that memory decides by: a little more or less makes no other fit
CALIBRATION_SHARE = 0.4  # of the memory: what their activations may take
MEASURING_SHARE = 1 / 3  # of the memory: what teacher and file may take in float32
SPEED_BATCHES = 3  # at least, that tell how fast the teacher reads: the quickest one counts
SPEED_SHARE = 1 / 300  # of the minutes, at least: three batches told 524 tokens a second for 650
LEAST_TOKENS = 16384  # of a cache, and of a fit, with few minutes
TIGHT_TOKENS = 8192  # with next to none
LEAST_BLOCKS = 16  # of which two are for validation
SHORT_MINUTES = 15  # below which there is no time for turns
TIGHT_MINUTES = 5  # below which there is next to none for a fit
FINE_KL = 0.2  # predicted: ten minutes of training gain nothing at 0.07, 3% at 0.16, 9% at 0.28
COST_TOKENS = 4096  # of the text that costs are measured on
LATE_SHARE = 0.25  # of the time that training is left with, kept for what comes after it
LEAST_SHARE = 0.05  # of the minutes: with less left, seeing how long a step takes would use it up
FINAL_LEAST_SHARE = 0.25  # after a final fit: so much is left where steps are quick, as on a GPU
TRAINED_SHARE = 0.6  # of the predicted KL: held by the formats that train
SCALE_LR_RATIO = 0.1  # of relative rates: scales at 0.0005 a step where weights have 0.005
EMBEDDING_GRAM = "embedding"  # its name among those of runs, which end in a number
Made = TypeVar("Made")
NUMBERS = ("kl_nats", "kl_p99", "top1_agreement", "perplexity")
REMEDY = "remove it"  # what a file of the work folder held is made again


class Amount(TypedDict):
    """How much of the text a cache keeps."""

    num_sequences: Count
    text_sequences: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class FitKind:
    """What decides how long a fit takes."""

    name: str
    share: float
    """Of the minutes: when the fit should end."""
    fixed_tokens: int
    """The searches of every weight take what the teacher takes to read so many tokens (SmolLM2 on
    two cores): both are in proportion to the weights."""
    sweeps: int
    """After the first codes."""
    least_tokens: int = LEAST_TOKENS
    """That calibrate it, however little time is left."""


# With next to no time, without turns, before training, and one that training is not expected to
# improve: more sweeps lose 2 to 4% of the error, fits of weights take 40% longer.
TIGHT_FIT = FitKind(
    name="tight", share=0.7, fixed_tokens=60_000, sweeps=0, least_tokens=TIGHT_TOKENS
)
SHORT_FIT = FitKind(name="short", share=0.7, fixed_tokens=100_000, sweeps=1)
FIRST_FIT = FitKind(name="first", share=0.7, fixed_tokens=210_000, sweeps=1)
FINAL_FIT = FitKind(name="final", share=0.92, fixed_tokens=320_000, sweeps=3)


class MeasuredCosts(TypedDict):
    """What costs.json keeps."""

    costs: Costs
    grams: Sha256
    """Of the file of what was learned of outputs."""


class Measured(TypedDict):
    """A model's distance from the teacher, and the text that it was measured on."""

    kl_nats: float
    kl_p99: float
    top1_agreement: float
    perplexity: float | None
    measured_on: str
    perplexity_teacher: float | None


@dataclass(kw_only=True, slots=True)
class Spent:
    """What a clock's file, or that of a shared stage, holds."""

    seconds: float = 0.0
    shared: list[str] = field(default_factory=list)


class Clock:
    """Seconds of one file's stages, also those of earlier processes and those that others took.

    Stages that files of several sizes share count for each of them.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.limit = path, 60 * minutes
        kept = read_as(path, Spent, remedy=REMEDY) if path.is_file() else Spent()
        self.before, self.shared = kept.seconds, kept.shared
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of all processes so far."""
        return self.before + time.perf_counter() - self.started

    @property
    def left(self) -> float:
        """Seconds until the limit; all processes must ask."""
        return from_first(lambda: self.limit - self.seconds)

    def note(self) -> None:
        """Keep the seconds so far for a process that continues."""
        if is_first():
            write_json(self.path, {"seconds": self.seconds, "shared": self.shared})

    def shared_stage(self, name: str, make: Callable[[], Made]) -> Made:
        """Return what a stage makes that other files use too; count what it took the first one."""
        started, file = time.perf_counter(), self.path.with_name(f"{name}.stage.json")
        made = make()
        seconds = time.perf_counter() - started
        if not is_first():
            return made
        if not file.is_file():
            write_json(file, {"seconds": seconds})
        elif name not in self.shared:
            self.before += max(0.0, read_as(file, Spent, remedy=REMEDY).seconds - seconds)
        self.shared = [*{*self.shared, name}]
        return made


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The model and the text, opened and checked, no weights loaded."""

    config: SourceConfig
    place: Place
    folder: Path
    """Of the model."""
    base: dict[str, str]
    """Identity of its weights."""
    size: PlannedSize
    """Bytes of a plan's file."""
    work: Path
    """Where parts leave their results."""

    @classmethod
    def of(cls, config: SourceConfig, work: Path) -> "Source":
        """Open a model; refuse one that the target cannot hold, before any long work."""
        folder = model_folder(config.model)
        size = PlannedSize.of(config.to, empty_model(folder, device="meta"), folder)
        return cls(
            config=config,
            place=Place.of(config),
            folder=folder,
            base=model_identity(config.model),
            size=size,
            work=work,
        )

    @property
    def specs(self) -> dict[str, list[TensorSpec]]:
        """The formats that each tensor may take.

        On a CPU the points of vector grids are found in three times what scalar ones take, for some
        6% of the KL: a quick look and few minutes leave them out.
        """
        specs = candidates(self.config.to, self.size.tensors)
        is_hurried = self.config.is_quick or is_short(self.config.minutes)
        if not is_hurried or self.place.device.kind != "cpu":
            return specs
        return {name: [s for s in some if not s.is_vector] for name, some in specs.items()}

    @property
    def options(self) -> dict[str, Any]:
        """What every measurement takes."""
        return {"device": self.place.device.torch_device, "dtype": self.place.dtype}


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What a file of the work folder holds."""

    key: str
    """Of all that decides the value."""
    value: Any = None


def once(path: Path, key: object, make: Callable[[], Any], kind: type[Made]) -> Made:
    """Return what a file keeps under a key, else make it and keep it; checked to be of a kind.

    All processes make it, and all get what the first one made.
    """
    key = fingerprint(key)
    kept = from_first(partial(find_kept, path, key))
    if kept is not None:
        say(f"{path} is already complete")
        value = kept.value
    else:
        made = make()
        value = from_first(lambda: made)
        if is_first():
            write_json(path, {"key": key, "value": value})
    return as_type(value, kind, path, remedy=REMEDY)


def find_kept(path: Path, key: str) -> Kept | None:
    """Return what a file holds, None where it is not there or of another key."""
    if not path.is_file():
        return None
    kept = read_as(path, Kept, remedy=REMEDY)
    return kept if kept.key == key else None


def byte_table(source: Source) -> Table:
    """Return the table of formats with sizes only."""
    costs = {name: {spec.name: 0.0 for spec in specs} for name, specs in source.specs.items()}
    return choice_table(costs, source.specs, source.size)


def teacher_cache(source: Source) -> TeacherCache:
    """Return the teacher's hidden states on the data, built or found."""
    config = source.config

    def count() -> Amount:
        if config.is_quick:
            read = num_tokens = LEAST_TOKENS
        elif config.minutes:
            rate = num_processes() * forward_tokens_per_second(source)
            read = int(CACHE_SHARE * 60 * config.minutes * rate)
            num_tokens = max(read, calibration_tokens(source, MOST_CALIBRATION_TOKENS))
        else:
            read = CALIBRATION_TOKENS["hessian"]
            num_tokens = 2 * read
        least_tokens = TIGHT_TOKENS if is_tight(config.minutes) else LEAST_TOKENS
        least = max(LEAST_BLOCKS, least_tokens // config.seq_len)
        read, num_blocks = (max(least, number // config.seq_len) for number in (read, num_tokens))
        num_blocks = config.num_sequences or num_blocks
        read = min(read, num_blocks)
        return {"num_sequences": read, "text_sequences": num_blocks - read}

    asked = [config.num_sequences, config.minutes, config.is_quick]
    key = [config.data, config.seq_len, *asked, CACHE_SHARE, MOST_CALIBRATION_TOKENS]
    amount = once(source.work / "sequences.json", key, count, Amount)
    made = build_cache(
        BuildCacheConfig(
            teacher=config.model,
            data=config.data,
            content="hidden",
            seq_len=config.seq_len,
            num_sequences=amount["num_sequences"],
            text_sequences=amount["text_sequences"],
            seed=config.seed,
            dtype=config.dtype,
            device=config.device,
            output_dir=source.work / "cache",
        )
    )
    return open_cache(made.cache, source.folder, source.base["weights"])


def forward_tokens_per_second(source: Source) -> float:
    """Return how fast the teacher reads, after a warm-up."""
    model = load_dense(source.config.model, dtype=source.place.dtype)
    device, seconds = source.place.device, []
    least = SPEED_SHARE * 60 * source.config.minutes
    shape = (CALIBRATION_BATCH, source.config.seq_len)
    with device.hosting(model), torch.no_grad():
        batch = torch.zeros(shape, dtype=torch.int64, device=device.torch_device)
        while len(seconds) < SPEED_BATCHES or sum(seconds) < least:
            started = time.perf_counter()
            model.get_decoder()(input_ids=batch, use_cache=False)
            device.sync(wait=True)
            seconds.append(time.perf_counter() - started)
    return batch.numel() / min(seconds)


def cost_table(source: Source, cache: TeacherCache) -> Table:
    """Return bytes and cost of every format of every tensor, measured on the training part.

    What it learns of outputs is kept for the fits.
    """
    names = {name: [spec.name for spec in specs] for name, specs in source.specs.items()}

    def measure() -> MeasuredCosts:
        model = load_dense(source.config.model, dtype=source.place.dtype)
        batches = spread_batches(cache, max(1, num_tokens // cache.seq_len))
        step = min(len(batches), -(-num_tokens // COST_TOKENS))
        further = [batch for number, batch in enumerate(batches) if number % step]
        found = measure_costs(
            model, source.specs, batches[::step], source.place, further, has_turns=has_turns
        )
        grams = from_first(lambda: write_grams(file, found.grams))
        return {"costs": found.costs, "grams": grams}

    has_turns = source.config.fit == "hessian" and not is_short(source.config.minutes)
    most = GRAM_TOKENS if has_turns else COST_TOKENS
    num_tokens = min(most, cache.num_text * cache.seq_len // 4)
    key = [cache.fingerprint, source.base["weights"], names, num_tokens, PROBE_KL, has_turns]
    path, file = source.work / "costs.json", grams_file(source)
    found = once(path, key, measure, MeasuredCosts)
    if not from_first(lambda: file.is_file() and sha256_of_file(file) == found["grams"]):
        # Of no use without the other file, which was lost or changed.
        from_first(path.unlink)
        found = once(path, key, measure, MeasuredCosts)
    kept = {name: sorted(costs) for name, costs in found["costs"].items()}
    if kept != {name: sorted(formats) for name, formats in names.items()}:
        raise ValueError(f"{path} has no cost of some formats; {REMEDY}")
    return choice_table(found["costs"], source.specs, source.size)


def grams_file(source: Source) -> Path:
    """Return the file of what the costs' measurement learned of outputs."""
    return source.work / "grams.safetensors"


def write_grams(file: Path, grams: OutputGrams) -> str:
    """Keep G of outputs, of which rounded ones may have no factor.

    Returns:
        The file's sha256.
    """
    tensors = {f"{name}.{k}": g for name, runs in grams.runs.items() for k, g in enumerate(runs)}
    tensors[EMBEDDING_GRAM] = grams.embedding
    with atomic_file(file) as temporary:
        save_file(tensors, temporary)
        return sha256_of_file(temporary)


def read_grams(source: Source) -> OutputGrams:
    """Return what `write_grams` kept."""
    runs: dict[str, list[Tensor]] = {}
    with reading(grams_file(source), REMEDY):
        stored = load_file(grams_file(source))
        embedding = stored.pop(EMBEDDING_GRAM, None)
        keys = sorted(stored, key=lambda key: int(key.rpartition(".")[2]))
    for key in keys:
        runs.setdefault(key.rpartition(".")[0], []).append(stored[key])
    return OutputGrams(runs=runs, embedding=embedding)


def fit_plan(found: Allocation, source: Source, cache: TeacherCache, num_sequences: int) -> Path:
    """Fit the model to an allocation; return the student's folder, one for each fit."""
    file = source.work / "plans" / f"{fit_id(found, source, cache, num_sequences)}.json"
    from_first(lambda: write_json(file, source.size.plan(found).to_dict()))
    config = source.config
    settings = InitStudentConfig(
        model=config.model,
        plan=str(file),
        cache_dir=cache.folder,
        fit=config.fit,
        calibration_sequences=num_sequences,
        output=source.work / "students" / file.stem,
        sweeps=fit_kind(found, source).sweeps,
        turns=not is_short(config.minutes),
        dtype=config.dtype,
        device=config.device,
        eval=False,
    )
    return quantize(settings, lambda: read_grams(source)).checkpoint


def fit_id(found: Allocation, source: Source, cache: TeacherCache, num_sequences: int) -> str:
    """Return what names the files of a fit: plan, calibrating text, dtype and method."""
    config = source.config
    text = [cache.fingerprint, num_sequences, config.seq_len, config.dtype]
    how = [config.fit, fit_kind(found, source).sweeps, is_short(config.minutes)]
    return fingerprint([source.size.plan(found).to_dict(), text, how])[:12]


def fit_kind(found: Allocation, source: Source) -> FitKind:
    """Return which fit there is time for.

    A student near its teacher would take more steps than there is time for: its fit gets the time
    that training would have.
    """
    if is_short(source.config.minutes):
        return TIGHT_FIT if is_tight(source.config.minutes) else SHORT_FIT
    return FINAL_FIT if found.cost < FINE_KL else FIRST_FIT


def is_short(minutes: float) -> bool:
    """Return whether there is no time for a fit in turns."""
    return 0 < minutes < SHORT_MINUTES


def is_tight(minutes: float) -> bool:
    """Return whether there is next to no time for a fit."""
    return 0 < minutes < TIGHT_MINUTES


def fit_sequences(found: Allocation, source: Source, cache: TeacherCache, clock: Clock) -> int:
    """Return the sequences that calibrate a fit: what the minutes that are left have time for.

    Counted once for each kind of fit, so that a killed run goes on with the same, and files of
    several sizes share cache and fits.
    """
    kind, num_text = fit_kind(found, source), cache.num_text * cache.seq_len
    if clock.limit and not source.config.is_quick:

        def count() -> int:
            if clock.left <= (1 - kind.share) * clock.limit:
                return 0
            rate = num_processes() * forward_tokens_per_second(source)
            return fit_tokens(kind, clock.limit, clock.left, rate)

        file = source.work / "fit_tokens" / f"{kind.name}.json"
        key = [cache.fingerprint, clock.limit, kind.share, kind.fixed_tokens, FIT_PASSES]
        num_text = min(num_text, max(kind.least_tokens, once(file, key, count, Count)))
    return calibration_tokens(source, num_text) // cache.seq_len


def fit_tokens(kind: FitKind, limit: float, left: float, rate: float) -> int:
    """Return the tokens of text that a fit has time for.

    Args:
        kind: Of the fit.
        limit: Seconds of the whole.
        left: Those that are left.
        rate: Tokens a second that the teacher reads.
    """
    seconds = left - (1 - kind.share) * limit
    return max(0, int((seconds * rate - kind.fixed_tokens) / FIT_PASSES))


def calibration_tokens(source: Source, in_text: int) -> int:
    """Return the tokens that calibrate a fit, of those there are: as many as memory allows.

    Of each token a fit keeps inputs and outputs of a decoder layer's linears.
    """
    first = [info.shape for name, info in source.size.tensors.items() if ".0." in name]
    numbers = sum(sum(shape) for shape in first if len(shape) == 2)
    memory = from_first(lambda: source.place.device.eager().total_bytes() or host_bytes())
    in_memory = int(CALIBRATION_SHARE * memory) // (4 * max(1, numbers))
    in_memory -= in_memory % MEMORY_STEP if in_memory > MEMORY_STEP else 0
    most = MOST_CALIBRATION_TOKENS
    if source.config.fit == "moments":
        most = CALIBRATION_TOKENS["moments"]
    return max(source.config.seq_len, min(most, in_memory, in_text))


def train_student(
    student: Path,
    kl: float,
    source: Source,
    cache: TeacherCache,
    clock: Clock,
    found: Allocation,
) -> tuple[Path, float]:
    """Train a student in the time that is left; return the better one with its validation KL."""
    formats = trained_formats(found, source)
    least_share = FINAL_LEAST_SHARE if fit_kind(found, source) is FINAL_FIT else LEAST_SHARE
    settings = train_config(student, source, cache, formats)

    def count() -> int:
        return int((1 - LATE_SHARE) * clock.left / rehearse_training(settings))

    steps, file = 0, source.work / "steps" / f"{settings.output_dir.name}.json"
    # A run that was begun is gone on with, however late.
    is_begun = from_first(file.is_file)
    if formats and (clock.left > least_share * clock.limit or is_begun):
        steps = once(file, settings.output_dir.name, count, Count)
    if steps < 1:
        say("no time to train: the fit is exported as it is")
        return student, kl
    say(f"{steps} steps of {settings.batch_size} sequences")
    warmup = min(settings.optim.warmup_steps, max(1, steps // 10))
    settings = replace(
        settings, max_steps=steps, optim=replace(settings.optim, warmup_steps=warmup)
    )
    result = train(settings)
    trained = (Path(result.checkpoint), from_first(lambda: result.best_kl_nats))
    return min(trained, (student, kl), key=lambda pair: pair[1])


def trained_formats(found: Allocation, source: Source) -> tuple[str, ...]:
    """Return the formats that train: of as few bits as hold most of the predicted KL.

    A step takes half the time where embedding and half of the linears have 4 bits and stay as they
    are; what they would gain is less than what twice the text gives the others. Vector grids stay
    on a CPU: their points are found anew in several times what the rest of a step takes.
    """
    has_vectors = source.place.device.kind != "cpu"
    costs: dict[TensorSpec, float] = {}
    for choice in found.choices.values():
        spec = TensorSpec.from_name(choice.spec)
        if spec.is_quantized and (has_vectors or not spec.is_vector):
            costs[spec] = costs.get(spec, 0.0) + choice.cost
    for bits in sorted({spec.bits for spec in costs}):
        chosen = {spec.name: cost for spec, cost in costs.items() if spec.bits <= bits}
        if sum(chosen.values()) >= TRAINED_SHARE * sum(costs.values()):
            return tuple(sorted(chosen))
    return ()


def train_config(
    student: Path, source: Source, cache: TeacherCache, formats: tuple[str, ...]
) -> TrainConfig:
    """Return the settings of training, all but its steps."""
    config = source.config
    names = ("minutes", "batch_size", "lr", "seed", "eval_sequences", "dtype", "device")
    recipe = fingerprint([formats, *(getattr(config, name) for name in names)])
    return TrainConfig(
        checkpoint=student,
        cache_dir=cache.folder,
        output_dir=source.work / "runs" / f"{student.name}-{recipe[:6]}",
        model_id=config.model,
        formats=formats,
        batch_size=config.batch_size,
        seed=config.seed,
        dtype=config.dtype,
        device=config.device,
        optim=OptimConfig(
            lr=config.lr, scale_lr_ratio=SCALE_LR_RATIO, relative=True, min_lr_ratio=0.0
        ),
        intervals=IntervalsConfig(eval_steps=0, eval_samples=config.eval_sequences, save_steps=50),
    )


def validation_kl(student: Path, source: Source, cache: TeacherCache) -> float:
    """Return a student's exact KL on the validation part of the data."""
    key = [open_checkpoint(student).header.sha256, cache.fingerprint]

    def measure() -> float:
        return measure_on_cache(open_checkpoint(student).load(), source, cache)["kl_nats"]

    return once(source.work / "measured" / f"{fingerprint(key)[:12]}.json", key, measure, float)


def measure_on_cache(model: nn.Module, source: Source, cache: TeacherCache) -> dict[str, Any]:
    """Return a model's numbers on the validation part of the data."""
    count = source.config.eval_sequences
    with dense_parts_in(model, source.place.dtype), source.place.device.hosting(model):
        return evaluate_on_cache(model, cache, num_sequences=count, **source.options)


def write_file(student: Path, source: Source, output: Path) -> None:
    """Export a student, in the place of a file that was made in this work folder of another one.

    Of several processes in the first one.
    """
    from_first(partial(replace_file, student, source, output))


def replace_file(student: Path, source: Source, output: Path) -> None:
    """Export a student as `write_file` does, in this process."""
    record = export_record(source.work, output)
    key = fingerprint([open_checkpoint(student).header.sha256, source.config.to])
    if output.exists() and record.is_file() and read_as(record, Kept, remedy=REMEDY).key == key:
        return
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)
    write_json(record, {"key": key})  # before the file: one without it was not made here
    export(ExportConfig(checkpoint=str(student), to=source.config.to, output=output))


def export_record(work: Path, output: Path) -> Path:
    """Return the file that tells of which student an output was made."""
    return work / "exports" / f"{output.name}.json"


def measure_file(output: Path, student: Path, source: Source, cache: TeacherCache) -> Measured:
    """Return the numbers of a file as it is read back.

    The exporters of folders have compared theirs with the student bit for bit: it stands for them.
    """
    if source.config.to == "gguf":
        model = read_gguf_model(output, source.folder)
    else:
        model = open_checkpoint(student).load()
    return measure_model(model, source, cache)


def measure_model(model: nn.Module, source: Source, cache: TeacherCache) -> Measured:
    """Return a model's distance from the teacher, on the text that was asked for.

    On a text of its own in float32, where that fits: the roundings of two models in bfloat16 alone
    are 0.003 nats apart (SmolLM2-135M).
    """
    config = source.config
    if config.eval_text is None:
        values = measure_on_cache(model, source, cache)
        told = {"measured_on": "validation part of the data", "perplexity_teacher": None}
        return {name: values[name] for name in NUMBERS} | told
    tokenizer = load_tokenizer(source.folder)
    blocks = text_blocks(config.eval_text, tokenizer, config.seq_len, config.eval_sequences)
    options = {"blocks": blocks, "num_context": 0 if bos_id(tokenizer) is None else 1}
    dtype = measuring_dtype(source)
    options |= {"device": source.place.device.torch_device, "dtype": dtype}
    teacher = load_dense(config.model, dtype=dtype)
    source.place.device.place(teacher)
    with dense_parts_in(model, dtype), source.place.device.hosting(model):
        values = evaluate_on_text(model, teacher, **options)
    own = evaluate_on_text(teacher, None, **options)["perplexity"]
    told = {"measured_on": config.eval_text.name, "perplexity_teacher": own}
    return {name: values[name] for name in NUMBERS} | told


def measuring_dtype(source: Source) -> torch.dtype:
    """Return float32 where teacher and file in it leave room on the device, else what computes."""
    total = source.place.device.total_bytes()
    needed = 2 * torch.float32.itemsize * source.size.num_weights
    fits = total is None or needed <= MEASURING_SHARE * total
    return torch.float32 if fits else source.place.dtype


def size_on_disk(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sum(one.stat().st_size for one in files)
