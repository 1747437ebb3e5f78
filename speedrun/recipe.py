"""Run one recipe of fit and training within a number of minutes, and note it as a row of a CSV.

    cache > fit > measure > train > measure (> held-out text, once)

Recipes are compared by the exact KL on the validation part of the data. The held-out text is for
the one that won: name it then, with three seeds. A recipe that was killed continues with the same
flags; one that has its row is not run again.
"""

import csv
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qat.cli.command import run_command
from qat.pipelines.quantize_config import Fit
from qat.runtime.config import PlaceConfig, require_at_least
from qat.storage.files import atomic_file, fingerprint
from qat.tracking.record import config_as_json, flat_settings
from qat.train.config import IntervalsConfig, LayerwiseConfig, LossConfig, OptimConfig, Part

CHANGED = ("batch_size", "trainable", "formats", "fit", "optim", "loss", "layerwise")
LATE_SHARE = 0.1  # of the time left, which steps slower than the rehearsed ones may take


@dataclass(frozen=True, kw_only=True, slots=True)
class FitRecipe:
    """How codes, scales and codebooks are fitted."""

    method: Fit = "hessian"
    """As --fit of `qat init-student`."""
    sequences: int | None = None
    """Blocks that calibrate; as many as the method takes when not given."""
    turns: bool = True
    """As in `qat init-student`."""
    sweeps: int = 2
    """As in `qat init-student`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeConfig(PlaceConfig):
    """Fit a model to a plan and train it, within minutes, and append the result to a table."""

    name: str
    """Of the recipe, in the table."""
    model: str
    """Hugging Face folder of the full-precision model."""
    data: str
    """Text that calibrates, trains and validates."""
    plan: str = "q2a4"
    """As in `qat init-student`; what it leaves in 16 bits counts in the bits of the row."""
    minutes: float = 15.0
    """For fit and training together, after the teacher's cache; 0 = the fit alone."""
    sequences: int = 4096
    """Blocks of the teacher's cache, which recipes share."""
    seq_len: int = 64
    """Tokens of a block."""
    heldout: Path | None = None
    """Text that the finished student is measured on."""
    eval_sequences: int = 64
    """Blocks of a measurement."""
    table: Path = Path("runs/recipes.csv")
    """Rows of all recipes."""
    work: Path = Path("runs/recipes")
    """Cache, students and runs."""
    seed: int = 0
    """Of the order of the data and every draw in training."""
    batch_size: int = 16
    """Sequences of a step."""
    trainable: tuple[Part, ...] = ("auto",)
    """As in `qat train`."""
    formats: tuple[str, ...] | None = None
    """As in `qat train`."""
    fit: FitRecipe = field(default_factory=FitRecipe)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=0.005, scale_lr_ratio=0.1, relative=True, min_lr_ratio=0.0
        )
    )
    loss: LossConfig = field(default_factory=LossConfig)
    layerwise: LayerwiseConfig = field(default_factory=LayerwiseConfig)

    def __post_init__(self) -> None:
        require_at_least(0, self, "minutes", "seed")
        require_at_least(1, self, "sequences", "batch_size", "eval_sequences")

    @property
    def changes(self) -> dict[str, Any]:
        """Return the settings of fit and training that are not the defaults."""
        usual = RecipeConfig(name="", model="", data="")
        mine, theirs = (flat_settings(config_as_json(one)) for one in (self, usual))
        return {
            flag: value
            for flag, value in mine.items()
            if flag.split(".")[0] in CHANGED and value != theirs[flag]
        }


def run_recipe(config: RecipeConfig) -> dict[str, Any]:
    """Take the stages, append the row; return it."""
    import qat

    key = fingerprint(config_as_json(replace(config, work=Path(), table=Path())))[:12]
    for row in read_rows(config.table):
        if row["key"] == key:
            return row
    place = {"dtype": config.dtype, "device": config.device}
    cache = qat.build_cache(
        config.model,
        config.data,
        content="hidden",
        seq_len=config.seq_len,
        num_sequences=config.sequences,
        output_dir=config.work / "cache",
        **place,
    ).cache
    measured = {"num_sequences": config.eval_sequences, **place}
    fitted, fit_seconds = fit_student(config, cache, place)
    row = {
        "key": key,
        "name": config.name,
        "model": Path(config.model).name,
        "plan": config.plan,
        "minutes": config.minutes,
        "seed": config.seed,
        "changes": json.dumps(config.changes),
    }
    values = qat.evaluate(fitted, cache=cache, **measured)
    row |= {"bits_per_weight": values.bits_per_weight_model, "fit_seconds": round(fit_seconds)}
    seconds = 60 * config.minutes - fit_seconds
    student, trained = train_student(config, fitted, cache, place, seconds)
    kl = qat.evaluate(student, cache=cache, **measured).kl_nats if trained else values.kl_nats
    row |= {**trained, "kl_fit": values.kl_nats, "kl": kl}
    if config.heldout is not None:
        text = {"text": config.heldout, "teacher": config.model, "seq_len": config.seq_len}
        held = qat.evaluate(student, **text, **measured)
        row |= {"kl_heldout": held.kl_nats, "p99_heldout": held.kl_p99}
        row |= {"top1_heldout": held.top1_agreement}
    write_row(config.table, row)
    return row


def fit_student(config: RecipeConfig, cache: str, place: dict[str, str]) -> tuple[Path, float]:
    """Return the folder of the fitted student and the seconds of its fit.

    Recipes of the same fit share it; each counts what it took.
    """
    import qat
    from qat.pipelines.compress_stages import once

    settings = asdict(config.fit)
    name = fingerprint([config.model, config.plan, str(cache), settings, place])[:12]
    folder, started = config.work / "students" / name, time.perf_counter()
    qat.quantize(
        config.model,
        config.plan,
        cache=cache,
        output=folder,
        fit=settings.pop("method"),
        calibration_sequences=settings.pop("sequences"),
        eval=False,
        **settings,
        **place,
    )
    seconds = time.perf_counter() - started
    path = config.work / "seconds" / f"{name}.json"
    return folder, once(path, name, lambda: seconds, float)


def train_student(
    config: RecipeConfig, fitted: Path, cache: str, place: dict[str, str], seconds: float
) -> tuple[Path, dict[str, Any]]:
    """Return the student after as many steps as there is time for, and what to note of them."""
    from qat.pipelines.compress_stages import once
    from qat.pipelines.step_time import rehearse_training
    from qat.pipelines.train import train
    from qat.train.config import TrainConfig

    settings = TrainConfig(
        checkpoint=fitted,
        cache_dir=Path(cache),
        output_dir=config.work / "runs" / fingerprint([config_as_json(config), fitted.name])[:12],
        model_id=config.model,
        formats=config.formats,
        trainable=config.trainable,
        batch_size=config.batch_size,
        seed=config.seed,
        optim=config.optim,
        loss=config.loss,
        layerwise=config.layerwise,
        intervals=IntervalsConfig(eval_steps=0, eval_samples=config.eval_sequences, save_steps=50),
        **place,
    )
    run = settings.output_dir.name
    started = time.perf_counter()

    def count() -> int:
        return int((1 - LATE_SHARE) * seconds / rehearse_training(settings))

    steps = once(config.work / "steps" / f"{run}.json", run, count, int) if seconds > 0 else 0
    if steps < 1:
        return fitted, {}
    warmup = min(settings.optim.warmup_steps, max(1, steps // 10))
    optim = replace(settings.optim, warmup_steps=warmup)
    result = train(replace(settings, max_steps=steps, optim=optim))
    noted = {"steps": steps, "train_seconds": round(time.perf_counter() - started)}
    return Path(result.checkpoint), noted


def read_rows(table: Path) -> list[dict[str, Any]]:
    """Return the rows of a table; none where there is no file."""
    if not table.is_file():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def write_row(table: Path, row: dict[str, Any]) -> None:
    """Append a row to a table, whose columns grow with what rows hold."""
    rows = [*read_rows(table), row]
    columns = list(dict.fromkeys(name for one in rows for name in one))
    with atomic_file(table) as temporary, Path(temporary).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    raise SystemExit(run_command("python speedrun/recipe.py", RecipeConfig, run_recipe))
