"""From no model at all to files that llama.cpp runs: the whole path on text that Python brings.

    text > tokenizer > shards > pretrain > teacher cache > students > GGUF > runtime

The text is Python's own: docstrings of the standard library and the topics of its language
reference, both under the PSF licence, read from the installation and not copied. Every stage finds
what it has made before.
"""

import ast
import json
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qat.cli.command import run_command
from qat.data.config import TokenizerKind
from qat.runtime.config import PlaceConfig, require_at_least
from qat.tracking.messages import say

SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idlelib")  # of the standard library
HELDOUT_RATIO = 0.05
# A student a row: name of the file and the format of its linears, ordered by bits.
STUDENTS = {"q4_0": "gguf:q4_0", "iq3_s": "gguf:iq3_s", "tq2_0": "gguf:tq2_0"}
IN_RUNTIME = ("runtime_kl_nats", "same_answers", "same_samples", "equal_tokens")
PROMPTS = ("Return the number of", "The module provides", "A class that", "Raise an error if")
COLUMNS = ("file", "bytes", "kl_nats", "perplexity", "runtime", *IN_RUNTIME)


@dataclass(frozen=True, kw_only=True, slots=True)
class MilestoneConfig(PlaceConfig):
    """Make a model from text, and small files of it that a runtime runs, and compare them."""

    output_dir: Path = Path("runs/milestone")
    """Where everything goes."""
    arch: str = "tiny-15m"
    """As in `qat pretrain`."""
    kind: TokenizerKind = "sentencepiece-bpe"
    """As in `qat train-tokenizer`."""
    vocab_size: int = 7680
    """Tokens of the tokenizer, and rows of the model's embedding."""
    seq_len: int = 256
    """Tokens of a block in pretraining."""
    batch_size: int = 8
    """Blocks of a step."""
    steps: int = 250
    """Steps of pretraining."""
    student_steps: int = 30
    """Steps of each student."""
    sequences: int = 1024
    """Blocks of 64 tokens in the teacher cache."""
    documents: int | None = None
    """Documents of the text at most; all when not given."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require_at_least(1, self, "steps", "sequences", "batch_size", "documents")
        require_at_least(0, self, "student_steps")

    @property
    def place(self) -> dict[str, str]:
        """Return where to compute, as settings of every stage."""
        return {"device": self.device, "dtype": self.dtype}


def run_milestone(config: MilestoneConfig) -> dict[str, Any]:
    """Take all stages; return what the model came to and a row for each file."""
    import qat

    started = time.perf_counter()
    train_text, heldout_text = write_text(config)
    trained = make_model(config)
    teacher = Path(trained["checkpoint"])
    cache = qat.build_cache(
        teacher,
        train_text,
        content="hidden",
        seq_len=64,
        num_sequences=config.sequences,
        output_dir=config.output_dir / "cache",
        **config.place,
    ).cache
    rows = [file_row(config, teacher, teacher, "f16", heldout_text)]
    for name, plan in STUDENTS.items():
        student = make_student(config, teacher, cache, name, plan)
        rows.append(file_row(config, teacher, student, name, heldout_text))
    show(rows)
    minutes = round((time.perf_counter() - started) / 60, 1)
    say(f"{trained['tokens_per_second']:.0f} tokens/s in pretraining, {minutes} minutes in all")
    return {"pretrain": trained, "files": rows, "minutes": minutes}


def write_text(config: MilestoneConfig) -> tuple[Path, Path]:
    """Write the documents, those of the training side and the held-out ones; return both files.

    The second holds the documents that `qat tokenize` holds out, as plain text.
    """
    from qat.data.token_shards import is_heldout
    from qat.storage.files import read_json, write_json
    from qat.storage.files import write_text as write_file

    folder = config.output_dir / "text"
    train, heldout = folder / "train.jsonl", folder / "heldout.txt"
    settings, record = {"documents": config.documents}, folder / "text.json"
    if record.is_file() and (found := read_json(record)) != settings:
        raise ValueError(
            f"{folder} was made with --documents {found.get('documents')}, asked for is "
            f"{config.documents}; choose another --output-dir or remove the folder"
        )
    if not record.is_file():
        texts = list(islice(documents(), config.documents))
        sides: tuple[list[str], list[str]] = ([], [])
        for text in texts:
            sides[is_heldout(text, HELDOUT_RATIO)].append(text)
        write_file(folder / "all" / "python.jsonl", as_lines(texts))
        write_file(train, as_lines(sides[False]))
        write_file(heldout, "\n\n".join(sides[True]))
        write_json(record, settings)
    return train, heldout


def as_lines(texts: list[str]) -> str:
    """Return texts as the lines of a jsonl file."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def documents() -> Iterator[str]:
    """Yield topics of the language reference, then the docstrings of each module in one."""
    from pydoc_data.topics import topics

    yield from (topics[name].strip() for name in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        if set(SKIPPED) & set(file.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # modules that tests of the parser read
            continue
        if text := "\n\n".join(docstrings(tree)):
            yield text


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (found := ast.get_docstring(node)):
            yield found


def make_model(config: MilestoneConfig) -> dict[str, Any]:
    """Learn a tokenizer, tokenize the text, train the model; return how training ended."""
    from qat.data.config import TokenizeConfig, TrainTokenizerConfig
    from qat.pipelines.pretrain import pretrain
    from qat.pipelines.tokenize_text import tokenize
    from qat.pipelines.train_tokenizer import train_tokenizer
    from qat.train.config import IntervalsConfig
    from qat.train.dense_config import DenseOptimConfig
    from qat.train.pretrain_config import PretrainConfig

    folder = config.output_dir
    data = str(folder / "text" / "all")
    tokenizer = TrainTokenizerConfig(
        data=data, output=folder / "tokenizer", kind=config.kind, vocab_size=config.vocab_size
    )
    shards = TokenizeConfig(
        data=data,
        tokenizer=train_tokenizer(tokenizer).tokenizer,
        output_dir=folder / "shards",
        heldout_ratio=HELDOUT_RATIO,
    )
    run = PretrainConfig(
        data_dir=Path(tokenize(shards).shards),
        output_dir=folder / "pretrain",
        arch=config.arch,
        vocab_size=config.vocab_size,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        max_steps=config.steps,
        optim=DenseOptimConfig(lr=2e-3, warmup_ratio=0.05),
        intervals=IntervalsConfig(eval_steps=max(1, config.steps // 8), eval_samples=32),
        **config.place,
    )
    return asdict(pretrain(run))


def make_student(config: MilestoneConfig, teacher: Path, cache: Path, name: str, plan: str) -> Path:
    """Fit a student to a format and train it; return its folder."""
    import qat

    fitted = config.output_dir / "students" / name
    qat.quantize(
        teacher, plan, cache=cache, output=fitted, fit="moments", eval=False, **config.place
    )
    if not config.student_steps:
        return fitted
    run = qat.train(
        fitted,
        cache,
        output_dir=config.output_dir / "runs" / name,
        max_steps=config.student_steps,
        batch_size=config.batch_size,
        optim={"lr": 0.005, "scale_lr_ratio": 0.1, "relative": True},
        intervals={"eval_steps": 0},
        **config.place,
    )
    return Path(run.checkpoint)


def file_row(
    config: MilestoneConfig, teacher: Path, student: Path, name: str, text: Path
) -> dict[str, Any]:
    """Export a student, measure it on held-out text, run its file in a runtime; return its row."""
    import qat

    file = config.output_dir / f"{name}.gguf"
    if not file.exists():
        dense = {"dtype": "fp16"} if student == teacher else {}
        qat.export(student, "gguf", file, **dense)
    found = qat.evaluate(
        student, text=text, teacher=teacher, seq_len=64, num_sequences=64, **config.place
    )
    measured = {name: getattr(found, name) for name in ("kl_nats", "perplexity", "top1_agreement")}
    row = {"file": file.name, "bytes": file.stat().st_size, **measured}
    return row | in_runtime(config, student, file)


def in_runtime(config: MilestoneConfig, student: Path, file: Path) -> dict[str, Any]:
    """Return how far a file in its runtime is from the student; why not, where none is here."""
    from qat.export.parity_config import ParityConfig
    from qat.pipelines.parity import check_parity
    from qat.storage.files import write_text as write_file

    prompts = config.output_dir / "prompts.txt"
    write_file(prompts, "".join(f"{prompt}\n" for prompt in PROMPTS))
    try:
        found = check_parity(ParityConfig(checkpoint=str(student), export=file, prompts=prompts))
    except ValueError as error:
        return {"runtime": f"none: {error}"}
    values = asdict(found) | {"runtime_kl_nats": found.kl_nats}
    return {name: values[name] for name in ("runtime", *IN_RUNTIME, "max_logit_difference")}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table on standard error."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-out text; the runtime against PyTorch on the same weights")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("file", "runtime") else "right")
    for row in rows:
        values = (row.get(column) for column in COLUMNS)
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    Console(stderr=True, width=120).print(table)


if __name__ == "__main__":
    raise SystemExit(run_command("python speedrun/milestone.py", MilestoneConfig, run_milestone))
