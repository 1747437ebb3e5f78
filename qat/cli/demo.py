"""`qat demo`: the whole path on SmolLM2-135M, each stage a command of its own.

A stage that is made already is found by what decided it, so the demo can be cut short and run
again.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.cli.command import run_command
from qat.tracking.messages import say

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
    "kd_loss",
    "perplexity",
    "perplexity_stderr",
    "top1_agreement",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Run the whole path on SmolLM2-135M: teacher, cache, 4 bits, 2 bits, training, export."""

    output_dir: Path = Path("runs/demo")
    """Where students, run and export go."""
    model_dir: Path = Path("models/smollm2-135m")
    """Where the teacher goes."""
    cache_dir: Path = Path("caches")
    """Where the cache goes."""
    max_steps: int = 64
    """Training steps of 512 tokens."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat demo", DemoConfig, act, argv)


def act(config: DemoConfig) -> dict[str, Any]:
    """Walk the path and return the closing table."""
    from qat.cache.config import BuildCacheConfig
    from qat.cli import build_cache, compare, convert_q4_to_q2, fetch, init_student, train
    from qat.pipelines.quantize_config import ConvertQ4ToQ2Config, InitStudentConfig
    from qat.reports.compare import CompareConfig
    from qat.runtime.memory import peak_rss_bytes
    from qat.storage.files import write_json
    from qat.train.config import TrainConfig

    started = time.perf_counter()
    teacher, runs = config.model_dir, config.output_dir
    stage("1/8 teacher")
    fetch.fetch(fetch.FetchConfig(source=("smollm2",), output_dir=teacher))
    stage("2/8 teacher cache")
    cache = build_cache.build(
        BuildCacheConfig(
            teacher=str(teacher),
            data="speedrun/data/instructions.jsonl",
            format="alpaca",
            thinking="none",
            seq_len=64,
            top_k=64,
            output_dir=config.cache_dir,
        )
    )
    cache_dir = Path(cache["cache"])
    stage("3/8 4-bit student")
    q4 = init_student.act(
        InitStudentConfig(
            model=str(teacher),
            scheme="q4a4",
            fit=QUICK_FIT,
            cache_dir=cache_dir,
            output=runs / "q4",
        )
    )
    stage("4/8 2-bit student")
    q2 = convert_q4_to_q2.act(
        ConvertQ4ToQ2Config(
            q4_checkpoint=runs / "q4",
            fit=QUICK_FIT,
            output=runs / "q2_init",
            eval=True,
            cache_dir=cache_dir,
        )
    )
    stage(f"5/8 training, {config.max_steps} steps")
    trained = train.act(
        TrainConfig(
            v2_checkpoint=runs / "q2_init",
            cache_dir=cache_dir,
            output_dir=runs / "q2_mlp",
            mlp_only=True,
            lr=QUICK_LR,
            max_steps=config.max_steps,
            eval_steps=0,
            save_steps=32,
        )
    )
    stage("6/8 held-out numbers")
    measured = {
        "teacher": remembered(runs, "teacher", cache_dir, str(teacher)),
        "q4": q4,
        "q2_init": q2,
        "q2_trained": remembered(runs, "q2_trained", cache_dir, trained["checkpoint"]),
    }
    stage("7/8 plain Hugging Face folder")
    export_once(trained["checkpoint"], runs / "hf")
    stage("8/8 answers")
    answers = {
        name: answers_once(runs, name, checkpoint)
        for name, checkpoint in {
            "teacher": str(teacher),
            "q2_init": str(runs / "q2_init"),
            "q2_trained": trained["checkpoint"],
        }.items()
    }
    compared = compare.compare(
        CompareConfig(
            runs=tuple(runs / name for name in ("q4", "q2_init", "q2_mlp")), output=runs / "compare"
        )
    )
    rows = {name: {key: row.get(key) for key in COLUMNS} for name, row in measured.items()}
    show(rows, answers, compared["plot"])
    closing = {
        **rows,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    write_json(runs / "demo.json", closing)
    return closing


def stage(name: str) -> None:
    """Announce a stage."""
    say(f"\n== {name}")


def identity(checkpoint: str) -> str:
    """Return what names a student's or a teacher's weights."""
    from qat.model.checkpoint import is_checkpoint, read_header
    from qat.model.load import model_identity

    if is_checkpoint(Path(checkpoint)):
        return read_header(checkpoint).sha256
    return model_identity(checkpoint)["weights"]


def once(path: Path, key: Any, make: Callable[[], Any]) -> Any:
    """Return what a file remembers under this key, else make it and remember it."""
    from qat.storage.files import read_json, write_json

    if path.is_file():
        kept = read_json(path)
        if kept["key"] == key:
            say(f"{path} is there: nothing to do")
            return kept["value"]
    value = make()
    write_json(path, {"key": key, "value": value})
    return value


def remembered(runs: Path, name: str, cache_dir: Path, checkpoint: str) -> dict[str, Any]:
    """Return what `qat evaluate` finds for a checkpoint on a cache."""
    from qat.cli import evaluate
    from qat.evaluate.config import EvaluateConfig

    config = EvaluateConfig(checkpoint=checkpoint, cache_dir=cache_dir)
    key = [identity(checkpoint), cache_dir.name]
    return once(runs / "evaluated" / f"{name}.json", key, lambda: evaluate.act(config))


def answers_once(runs: Path, name: str, checkpoint: str) -> list[str]:
    """Return what `qat generate` answers to the demo's prompts."""
    from qat.cli import generate
    from qat.evaluate.generate_config import GenerateConfig

    config = GenerateConfig(checkpoint=checkpoint, prompt=PROMPTS, max_new_tokens=40)
    key = [identity(checkpoint), list(PROMPTS)]
    made = once(runs / "answers" / f"{name}.json", key, lambda: generate.generate(config))
    return [pair["answer"] for pair in made["answers"]]


def export_once(checkpoint: str, output: Path) -> None:
    """Write the student as `qat export --to hf` does, in the place of one of other weights."""
    import shutil

    from qat.cli import export
    from qat.export.config import ExportConfig

    def make() -> dict[str, Any]:
        shutil.rmtree(output, ignore_errors=True)
        return export.act(ExportConfig(checkpoint=checkpoint, to="hf", output=output))

    memory = output.with_suffix(".json")
    if not (output / "export.json").is_file():
        memory.unlink(missing_ok=True)
    once(memory, identity(checkpoint), make)


def show(rows: dict[str, Any], answers: dict[str, list[str]], plot: str | None) -> None:
    """Print the closing table, the answers side by side and where the plot is."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, width=120)
    table = Table(title="held-out split; the teacher itself lies on a 4-bit grid")
    for column in ("", *(column.replace("bits_per_weight", "bits") for column in COLUMNS)):
        table.add_column(column.replace("_", " "), justify="right" if column else "left")
    for name, row in rows.items():
        cells = ["" if row[key] is None else f"{row[key]:.4g}" for key in COLUMNS]
        table.add_row(name, *cells)
    console.print(table)
    for number, prompt in enumerate(PROMPTS):
        console.print(f"\n[bold]{prompt}[/bold]")
        for name, texts in answers.items():
            console.print(f"  [italic]{name}[/italic]: ", end="")
            console.print(" ".join(texts[number].split()), markup=False, highlight=False)
    console.print(f"\nloss curves: {plot}")
