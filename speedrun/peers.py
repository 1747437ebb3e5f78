"""Students of other programs at the bits of ours, each made in an environment of its own.

    environments > students > exact KL of each on the same blocks

The linears of decoder layers are quantized; embedding, head and norms stay as they are, where ours
may have less. A file for llama.cpp, which AutoRound writes as well, holds all of the model on its
formats. `speedrun/environments/peer.py` says how each program is called.
What is there already is not made again.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from qat.cli.command import run_command
from qat.runtime.config import require_at_least
from qat.storage.files import sha256_of_file, write_json

if TYPE_CHECKING:
    from torch import Tensor

WORKER = Path(__file__).parent / "environments" / "peer.py"
PeerName = Literal["auto-round", "auto-round-gguf", "gptqmodel", "hqq", "torchao"]
RowName = Literal["q2a4", "mlp2.25", "4.5", "2.25"]


@dataclass(frozen=True, slots=True)
class Peer:
    """Another program: what installs it, and what it keeps of a group besides codes."""

    requirement: str
    scale_bits: int
    has_offset: bool = False
    """An integer offset of as many bits as a code has."""
    gguf: dict[RowName, str] = field(default_factory=dict)
    """For a file in the place of a folder: the format of each row that it has."""

    def bits(self, code_bits: int, group: int) -> float:
        """Return the bits of a weight."""
        return code_bits + (self.scale_bits + self.has_offset * code_bits) / group

    def widest_group(self, code_bits: int, least: float) -> int:
        """Return the largest group with at least so many bits a weight."""
        return max(size for size in (16, 32, 64, 128) if self.bits(code_bits, size) >= least)


PEERS: dict[PeerName, Peer] = {
    "auto-round": Peer("auto-round==0.16.1", 16),
    "auto-round-gguf": Peer("auto-round==0.16.1 gguf sentencepiece", 16, gguf={"4.5": "q4_0"}),
    "gptqmodel": Peer("gptqmodel==7.4.0 requests", 16, has_offset=True),
    "hqq": Peer("hqq==0.2.8.post1", 32),
    "torchao": Peer("torchao==0.18.0", 16),
}
# Bits of a code and at least so many a weight, of the MLP and of attention.
ROWS: dict[RowName, tuple[tuple[int, float], tuple[int, float]]] = {
    "q2a4": ((2, 2.5), (4, 4.5)),
    "mlp2.25": ((2, 2.25), (4, 4.5)),
    "4.5": ((4, 4.5), (4, 4.5)),
    "2.25": ((2, 2.25), (2, 2.25)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PeersConfig:
    """Quantize one model by other programs, and measure how far each student is from it."""

    model: str
    """Hugging Face folder of the full-precision model."""
    data: Path
    """Text that calibrates and trains."""
    eval_text: Path
    """Text that measures."""
    output_dir: Path = Path("runs/peers")
    """Environments, students and the table."""
    peers: tuple[PeerName, ...] = get_args(PeerName)
    """Programs."""
    rows: tuple[RowName, ...] = get_args(RowName)
    """Bits of MLP and attention."""
    seq_len: int = 64
    """Tokens of a block."""
    samples: int = 2048
    """Blocks that calibrate."""
    iters: int = 200
    """Of AutoRound, for each decoder layer."""
    batch_size: int = 16
    """Blocks of a step."""
    minutes: float = 60.0
    """For programs that train as long as they are told."""
    lr: float = 1e-4
    """Of these."""
    seed: int = 0
    """Of the order of blocks and every draw."""
    eval_sequences: int = 64
    """Blocks of a measurement."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require_at_least(1, self, "seq_len", "samples", "iters", "batch_size", "eval_sequences")
        if self.minutes <= 0:
            raise ValueError(f"--minutes {self.minutes} must be above 0; try 15")


def compare_peers(config: PeersConfig) -> list[dict[str, Any]]:
    """Make and measure a student of each program for each row."""
    from safetensors.torch import save_file

    config.output_dir.mkdir(parents=True, exist_ok=True)
    save_file({"blocks": training_blocks(config)}, blocks_file(config))
    table = []
    for name in config.peers:
        python = environment(name, config.output_dir / "environments" / name)
        for row in config.rows:
            if not (files := PEERS[name].gguf) or row in files:
                made = make_student(python, name, row, config)
                found = {"peer": PEERS[name].requirement, "row": row, **made}
                table.append(found | measured(config, made["student"]))
                print(json.dumps(table[-1]), file=sys.stderr)
    write_json(config.output_dir / "table.json", table)
    return table


def measured(config: PeersConfig, student: str) -> dict[str, float]:
    """Return how far a student is from the model, exactly."""
    import qat

    text = {"text": config.eval_text, "teacher": config.model, "seq_len": config.seq_len}
    if student.endswith(".gguf"):
        text["model_id"] = config.model
    found = qat.evaluate(student, num_sequences=config.eval_sequences, **text)
    return {"kl_nats": found.kl_nats, "kl_p99": found.kl_p99}


def blocks_file(config: PeersConfig) -> Path:
    """Return where the blocks of the text are."""
    return config.output_dir / "blocks.safetensors"


def training_blocks(config: PeersConfig) -> "Tensor":
    """Return the whole text as blocks, (N, L), in an order of its own."""
    import torch

    from qat.data.text import text_blocks
    from qat.model.load import load_tokenizer

    blocks = text_blocks(config.data, load_tokenizer(config.model), config.seq_len)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(config.seed))
    return blocks[order].contiguous()


def environment(name: PeerName, folder: Path) -> Path:
    """Return the Python of an environment that holds a program, beside our torch; make it once."""
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        ours = [f"{one}=={version(one).partition('+')[0]}" for one in ("torch", "transformers")]
        words = [python, "-m", "pip", "install", "-q", *ours, *PEERS[name].requirement.split()]
        subprocess.run(words, check=True, stdout=2)
        done.touch()
    return python


def make_student(python: Path, name: PeerName, row: RowName, config: PeersConfig) -> dict[str, Any]:
    """Have a program make a student, unless it is there; return what it is."""
    folder = config.output_dir / "students" / f"{name}-{row}"
    done, described = folder / "made.json", folder / "job.json"
    job = job_of(name, row, config) | {"output": str((folder / "student").absolute())}
    if done.is_file():
        if (stored := json.loads(described.read_text())) != job:
            raise ValueError(f"{folder} holds the student of {stored}, not of {job}; remove it")
        return json.loads(done.read_text())
    bits = {f"bits_{part}": PEERS[name].bits(*job[part]) for part in ("mlp", "attention")}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(described, job)
    started = time.perf_counter()
    subprocess.run(
        [python.absolute(), WORKER.absolute(), "job.json"], check=True, stdout=2, cwd=folder
    )
    seconds = round(time.perf_counter() - started)
    student = next(folder.glob("**/*.gguf"), folder / "student")
    if student.is_file():
        bits = {"file_bytes": student.stat().st_size}
    made = {"student": str(student), **bits, "seconds": seconds}
    write_json(done, made)
    return made


def job_of(name: PeerName, row: RowName, config: PeersConfig) -> dict[str, Any]:
    """Return what a program is to do, but for where it goes."""
    told = ("seq_len", "samples", "iters", "batch_size", "minutes", "lr", "seed")
    job = {"peer": name, "model": str(Path(config.model).absolute())}
    job |= {"blocks": str(blocks_file(config).absolute()), "text": sha256_of_file(config.data)}
    job |= {field: getattr(config, field) for field in told}
    for part, (code_bits, least) in zip(("mlp", "attention"), ROWS[row], strict=True):
        job[part] = [code_bits, PEERS[name].widest_group(code_bits, least)]
    return job | {"gguf": PEERS[name].gguf.get(row)}


if __name__ == "__main__":
    raise SystemExit(run_command("python speedrun/peers.py", PeersConfig, compare_peers))
