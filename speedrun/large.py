"""Random weights of a large model's shape to students: peak memory and seconds of each command.

The model is made decoder layer by decoder layer, so that it need not fit the memory either. Random
weights cost and weigh what trained ones do; how good a student of them is says nothing.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.cli.command import run_command
from qat.runtime.config import PlaceConfig, require_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DATA = Path(__file__).parent / "data" / "instructions.jsonl"
SPREAD = 0.02  # of random weights, as new models have it


@dataclass(frozen=True, kw_only=True, slots=True)
class LargeConfig(PlaceConfig):
    """Quantize random weights of a large model's shape in processes of their own, and weigh them.

    The last student is trained: layer by layer, and scales end to end with weights formed in use.
    Model and cache stay for the next call, students do not.
    """

    output_dir: Path = Path("runs/large")
    """Where everything goes."""
    arch: str = "kisoku-3.2b"
    """As in `qat pretrain`."""
    layers: int | None = None
    """Decoder layers, for a smaller model of the same layers; those of the shape when not given."""
    plans: tuple[str, ...] = ("q4a4", "q2a4")
    """Of the students."""
    seq_len: int = 64
    """Tokens of a block of the text that calibrates."""
    sequences: int = 4
    """Blocks that the teacher reads, and a student learns from."""
    max_steps: int = 2
    """Of training end to end."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require_at_least(1, self, "layers", "sequences", "max_steps")
        require_at_least(2, self, "seq_len")


def run_large(config: LargeConfig) -> dict[str, Any]:
    """Make model, cache and students; return their numbers."""
    from qat.pipelines.quantize_config import CALIBRATION_TOKENS

    model = config.output_dir / "model"
    if not (model / "config.json").is_file():
        make_model(config, model)
    place = ["--device", config.device, "--dtype", config.dtype]
    text_sequences = max(1, CALIBRATION_TOKENS["moments"] // config.seq_len - config.sequences)
    cache = run_qat(
        "build-cache",
        *("--teacher", model, "--data", DATA, "--format", "alpaca", "--thinking", "none"),
        *("--seq-len", config.seq_len, "--num-sequences", config.sequences, "--batch-size", 1),
        *("--heldout-ratio", 0, "--text-sequences", text_sequences, "--top-k", 8),
        *("--output-dir", config.output_dir / "caches", "--device", config.device),
        *("--dtype", "bf16"),  # half the memory; the few blocks may take their time
    )
    students = {}
    for plan in config.plans:
        output = config.output_dir / "students" / plan
        made = run_qat(
            "init-student",
            *("--model", model, "--plan", plan, "--fit", "moments", "--no-eval"),
            *("--cache-dir", cache["cache"], "--output", output, *place),
        )
        students[plan] = made | {"file_bytes": (output / "student.safetensors").stat().st_size}
        if plan == config.plans[-1]:
            trained = train_student(config, output, cache["cache"], place)
        shutil.rmtree(output)
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return {"model_bytes": weights, "build_cache": cache, "students": students, "train": trained}


def train_student(
    config: LargeConfig, student: Path, cache: str, place: list[str]
) -> dict[str, Any]:
    """Return the numbers of training a student layer by layer, and of its scales end to end."""
    layerwise = ("--layerwise.sequences", config.sequences, "--layerwise.epochs", 1)
    in_use = ("--trainable", "scales", "--gradient-checkpointing", "--form-weights", "in-use")
    stages = {
        "layer-wise": (*layerwise, "--max-steps", 0),
        "scales, formed in use": (*in_use, "--max-steps", config.max_steps, "--batch-size", 1),
    }
    numbers = {}
    for name, flags in stages.items():
        run = config.output_dir / "run"
        numbers[name] = run_qat(
            "train",
            *("--checkpoint", student, "--cache-dir", cache, "--output-dir", run),
            *flags,
            *place,
        )
        shutil.rmtree(run)
    return numbers


def make_model(config: LargeConfig, folder: Path) -> None:
    """Write a folder of random bfloat16 weights, a file for each decoder layer and one for else."""
    from qat.model.architectures import read_architecture
    from qat.model.checkpoint import empty_model_of
    from qat.storage.files import atomic_folder

    shape = read_architecture(config.arch)
    if config.layers is not None:
        shape.num_hidden_layers = config.layers
    model = empty_model_of(shape, device="meta")
    layers = model.get_decoder().layers
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    units = [[names.pop(id(one)) for one in layer.parameters()] for layer in layers]
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    with atomic_folder(folder) as made:
        write_units(made, [*units, list(names.values())], sizes)
        write_tokenizer(made)
        write_config(made, shape)


def write_units(folder: Path, units: list[list[str]], sizes: dict[str, tuple[int, ...]]) -> None:
    """Write a weight file for each unit's tensors, and their index."""
    import torch
    from safetensors.torch import save_file

    from qat.storage.files import write_json

    where = {}
    for number, names in enumerate(units):
        file = f"model-{number + 1:05d}-of-{len(units):05d}.safetensors"
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name in names:
            tensor = torch.empty(sizes[name], dtype=torch.bfloat16)
            is_norm = len(sizes[name]) < 2
            tensors[name] = (
                tensor.fill_(1) if is_norm else tensor.normal_(std=SPREAD, generator=generator)
            )
            where[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes, whose ids any vocabulary holds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: index for index, token in enumerate([*alphabet, "<|endoftext|>"])}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(
        folder
    )


def write_config(folder: Path, shape: "PreTrainedConfig") -> None:
    """Write the model's config."""
    shape.architectures, shape.dtype = ["LlamaForCausalLM"], "bfloat16"
    shape.bos_token_id = shape.eos_token_id = None
    shape.save_pretrained(folder)


def run_qat(command: str, *words: object) -> dict[str, Any]:
    """Run a command in a process of its own; return its closing line, wall seconds, peak memory."""
    started = time.perf_counter()
    line = [sys.executable, "-m", "qat", command, *map(str, words)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # its own peak, not that of all before it
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{' '.join(line)} ended with {process.returncode}")
    seconds = round(time.perf_counter() - started, 1)
    peak = usage.ru_maxrss * 1024
    return json.loads(said.splitlines()[-1]) | {"peak_rss_bytes": peak, "wall_seconds": seconds}


if __name__ == "__main__":
    raise SystemExit(run_command("python speedrun/large.py", LargeConfig, run_large))
