"""Files for MLX of equal size: ours, mlx-lm's own quantization, and its distilled one (DWQ).

All are run by mlx-lm on the CPU and measured on the same blocks against the same teacher. Needs
`mlx`, `mlx-cpu` and `mlx-lm`, which `make parity` installs.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.cli.command import run_command


@dataclass(frozen=True, kw_only=True, slots=True)
class MlxPeersConfig:
    """Make files of one model for MLX by three programs, and measure them."""

    model: str
    """Hugging Face folder of the full-precision model."""
    data: Path
    """Text that calibrates and trains."""
    eval_text: Path
    """Text that measures."""
    output: Path
    """Folder of the files; what it holds already is measured again, not made."""
    bits: int = 4
    """Of mlx-lm's quantization."""
    group_size: int = 64
    """Of mlx-lm's quantization."""
    minutes: float = 30.0
    """For our file."""
    dwq_samples: int = 2048
    """Blocks that mlx-lm distils on; 0 = leave it out."""
    dwq_lr: float = 1e-6
    """Its learning rate; mlx-lm's own default."""
    seq_len: int = 64
    """Tokens a block."""
    eval_sequences: int = 64
    """Blocks of a measurement."""


def compare_peers(config: MlxPeersConfig) -> dict[str, Any]:
    """Make and measure the three."""
    seconds = {}
    config.output.mkdir(parents=True, exist_ok=True)
    for name, make in (("mlx-lm", quantize_plainly), ("mlx-lm dwq", distil), ("qat", compress)):
        folder, started = config.output / name.replace(" ", "-"), time.perf_counter()
        if not folder.exists() and (name != "mlx-lm dwq" or config.dwq_samples):
            make(config, folder)
            seconds[name] = round(time.perf_counter() - started)
    rows = {}
    for name in ("mlx-lm", "mlx-lm dwq", "qat"):
        if (folder := config.output / name.replace(" ", "-")).is_dir():
            rows[name] = {"seconds": seconds.get(name), **measured(config, folder)}
            print(json.dumps({name: rows[name]}), file=sys.stderr)
    return rows


def run_mlx(*words: object) -> None:
    """Run a command of mlx-lm; its output goes to standard error."""
    subprocess.run([sys.executable, "-m", "mlx_lm", *map(str, words)], check=True, stdout=2)


def quantize_plainly(config: MlxPeersConfig, folder: Path) -> None:
    """Round to nearest, scales and offsets by the range of a group."""
    grid = ("--q-bits", config.bits, "--q-group-size", config.group_size)
    run_mlx("convert", "--hf-path", config.model, "--mlx-path", folder, "-q", *grid)


def distil(config: MlxPeersConfig, folder: Path) -> None:
    """Train mlx-lm's scales and offsets against the teacher's logits on the same text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
    ids = tokenizer(config.data.read_text(), add_special_tokens=False).input_ids
    blocks = [ids[at : at + config.seq_len] for at in range(0, len(ids), config.seq_len)]
    texts = config.output / "dwq-data"
    texts.mkdir(exist_ok=True)
    lines = (json.dumps({"text": tokenizer.decode(block)}) for block in blocks)
    (texts / "train.jsonl").write_text("\n".join(lines))
    grid = ("--bits", config.bits, "--group-size", config.group_size)
    size = ("--num-samples", config.dwq_samples, "--max-seq-length", config.seq_len + 1)
    words = ("--data-path", texts, "--batch-size", 16, "--learning-rate", config.dwq_lr)
    run_mlx("dwq", "--model", config.model, "--mlx-path", folder, *grid, *size, *words)


def compress(config: MlxPeersConfig, folder: Path) -> None:
    """Make our file, of no more bytes than mlx-lm's."""
    import qat

    size = folder_bytes(config.output / "mlx-lm")
    settings = {"to": "mlx", "minutes": config.minutes, "seq_len": config.seq_len}
    qat.compress(config.model, str(config.data), folder, size=str(size), **settings)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measured(config: MlxPeersConfig, folder: Path) -> dict[str, Any]:
    """Return a folder's bytes and its exact distance from the teacher, as mlx-lm runs it."""
    import torch

    from qat.data.text import text_blocks
    from qat.evaluate.on_text import evaluate_on_text
    from qat.export.runtimes import RuntimeModel, mlx_runtime
    from qat.model.load import load_dense, load_tokenizer

    blocks = text_blocks(
        config.eval_text, load_tokenizer(config.model), config.seq_len, config.eval_sequences
    )
    teacher = load_dense(config.model, dtype=torch.float32)
    model = RuntimeModel(mlx_runtime(folder))
    model.config.get_text_config = lambda: teacher.config
    values = evaluate_on_text(
        model, teacher, blocks, device=torch.device("cpu"), dtype=torch.float32
    )
    names = ("kl_nats", "kl_p99", "top1_agreement", "perplexity")
    return {"file_bytes": folder_bytes(folder), **{name: values[name] for name in names}}


if __name__ == "__main__":
    command = "python speedrun/mlx_peers.py"
    raise SystemExit(run_command(command, MlxPeersConfig, compare_peers))
