"""Run the whole path on SmolLM2-135M by the Python API.

A finished stage is found by its settings, so an interrupted demo continues where it stopped.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qat.evaluate.generate_config import GenerateConfig
from qat.model.checkpoint import is_checkpoint, read_header
from qat.model.load import model_identity
from qat.model.packaged import fetch_smollm2
from qat.pipelines.api import build_cache, evaluate, export, quantize, train
from qat.pipelines.compare import compare
from qat.pipelines.convert import convert_q4_to_q2
from qat.pipelines.demo_config import DemoConfig
from qat.pipelines.generate import generate
from qat.pipelines.quantize_config import ConvertQ4ToQ2Config
from qat.pipelines.students import Numbers
from qat.reports.compare import CompareConfig
from qat.runtime.memory import peak_rss_bytes
from qat.storage.files import read_json, write_json
from qat.tracking.messages import say

DATA = "speedrun/data/instructions.jsonl"
PROMPTS = (
    "What is the capital of Germany?",
    "Give me three tips for a good night's sleep.",
    "Write one sentence about the sea.",
)
QUICK_FIT = "moments"  # seconds instead of minutes; the default fit starts 40% closer
QUICK_LR = 4e-4  # twice the default: it starts further away, and there is no feedback to undo
COLUMNS = (
    "bits_per_weight",
    "bits_per_weight_mlp",
    "bits_per_weight_model",
    "kl_nats",
    "kl_nats_lower",
    "kd_loss",
    "perplexity",
    "perplexity_stderr",
    "top1_agreement",
)

Row = dict[str, float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """Held-out numbers and bits per weight of each model, and what the demo took."""

    teacher: Row
    """The full-precision model."""
    q4: Row
    """The 4-bit student."""
    q2_init: Row
    """The 2-bit student before training."""
    q2_trained: Row
    """The 2-bit student after training."""
    seconds: float
    """Of this call; finished stages take none."""
    peak_rss_bytes: int
    """Most memory that the process held."""


def demo(config: DemoConfig) -> DemoResult:
    """Make teacher, cache, students, run, export and answers; show them in a table."""
    started = time.perf_counter()
    teacher, runs = config.model_dir, config.output_dir
    say("\n== 1/8 teacher")
    fetch_smollm2(teacher)
    say("\n== 2/8 teacher cache")
    text = {"format": "alpaca", "thinking": "none", "seq_len": 64, "top_k": 64}
    cache = Path(build_cache(teacher, DATA, output_dir=config.cache_dir, **text).cache)
    say("\n== 3/8 4-bit student")
    q4 = quantize(teacher, "q4a4", cache=cache, output=runs / "q4", fit=QUICK_FIT).metrics
    say("\n== 4/8 2-bit student")
    q2 = convert_to_q2(runs, cache)
    say(f"\n== 5/8 training, {config.max_steps} steps")
    trained = train_student(config, cache)
    say("\n== 6/8 held-out numbers")
    measured = {
        "teacher": evaluate_once(runs, "teacher", cache, str(teacher)),
        "q4": q4,
        "q2_init": q2,
        "q2_trained": evaluate_once(runs, "q2_trained", cache, trained),
    }
    say("\n== 7/8 plain Hugging Face folder")
    export_once(trained, runs / "hf")
    say("\n== 8/8 answers")
    students = {"teacher": str(teacher), "q2_init": str(runs / "q2_init"), "q2_trained": trained}
    answers = {name: answer_once(runs, name, one) for name, one in students.items()}
    made = tuple(runs / name for name in ("q4", "q2_init", "q2_mlp"))
    plot = compare(CompareConfig(runs=made, output=runs / "compare")).plot
    rows = {name: {key: row.get(key) for key in COLUMNS} for name, row in measured.items()}
    show(rows, answers, plot)
    seconds = round(time.perf_counter() - started, 1)
    result = DemoResult(**rows, seconds=seconds, peak_rss_bytes=peak_rss_bytes())
    write_json(runs / "demo.json", asdict(result))
    return result


def convert_to_q2(runs: Path, cache: Path) -> Numbers:
    """Make the 2-bit student of the 4-bit one; return its numbers."""
    config = ConvertQ4ToQ2Config(
        q4_checkpoint=runs / "q4",
        fit=QUICK_FIT,
        output=runs / "q2_init",
        eval=True,
        cache_dir=cache,
    )
    return convert_q4_to_q2(config).metrics


def train_student(config: DemoConfig, cache: Path) -> str:
    """Train the 2-bit student's MLP layers; return the best one's folder."""
    return train(
        config.output_dir / "q2_init",
        cache,
        output_dir=config.output_dir / "q2_mlp",
        layers="mlp",
        max_steps=config.max_steps,
        optim={"lr": QUICK_LR},
        intervals={"eval_steps": 0, "save_steps": 32},
    ).checkpoint


def identity(checkpoint: str) -> str:
    """Return the hash of a student's or a teacher's weights."""
    if is_checkpoint(Path(checkpoint)):
        return read_header(checkpoint).sha256
    return model_identity(checkpoint)["weights"]


def once(path: Path, key: object, make: Callable[[], Any]) -> Any:
    """Return what a file holds under this key, else make it and write it there."""
    if path.is_file():
        kept = read_json(path)
        if kept["key"] == key:
            say(f"{path} is already complete")
            return kept["value"]
    value = make()
    write_json(path, {"key": key, "value": value})
    return value


def evaluate_once(runs: Path, name: str, cache: Path, checkpoint: str) -> dict[str, Any]:
    """Return the numbers of a checkpoint on a cache."""
    key = [identity(checkpoint), cache.name]
    path = runs / "evaluated" / f"{name}.json"
    return once(path, key, lambda: asdict(evaluate(checkpoint, cache=cache)))


def answer_once(runs: Path, name: str, checkpoint: str) -> list[str]:
    """Return the answers of a checkpoint to the demo's prompts."""
    config = GenerateConfig(checkpoint=checkpoint, prompt=PROMPTS, max_new_tokens=40)
    key = [identity(checkpoint), list(PROMPTS)]
    path = runs / "answers" / f"{name}.json"
    return once(path, key, lambda: [pair["answer"] for pair in generate(config).answers])


def export_once(checkpoint: str, output: Path) -> None:
    """Write the student as a plain folder, in the place of one of other weights."""

    def make() -> dict[str, Any]:
        shutil.rmtree(output, ignore_errors=True)
        return asdict(export(checkpoint, "hf", output))

    report = output.with_suffix(".json")
    if not (output / "export.json").is_file():
        report.unlink(missing_ok=True)
    once(report, identity(checkpoint), make)


def show(rows: dict[str, Row], answers: dict[str, list[str]], plot: str | None) -> None:
    """Print the closing table, the answers of all models and where the plot is."""
    console = Console(stderr=True, width=120)
    table = Table(title="held-out split; the teacher itself is on a 4-bit grid")
    shown = [key for key in COLUMNS if any(row[key] is not None for row in rows.values())]
    for column in ("", *(column.replace("bits_per_weight", "bits") for column in shown)):
        table.add_column(column.replace("_", " "), justify="right" if column else "left")
    for name, row in rows.items():
        table.add_row(name, *("" if row[key] is None else f"{row[key]:.4g}" for key in shown))
    console.print(table)
    for number, prompt in enumerate(PROMPTS):
        console.print(f"\n[bold]{prompt}[/bold]")
        for name, texts in answers.items():
            console.print(f"  [italic]{name}[/italic]: ", end="")
            console.print(" ".join(texts[number].split()), markup=False, highlight=False)
    console.print(f"\nloss curves: {plot}")
