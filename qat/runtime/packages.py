"""What is installed and what does not fit together, told from metadata: nothing is imported.

Asking before importing matters: torch_xla against another torch dies with an undefined symbol,
and torch with torch_tpu but without libtpu ends the whole process at `import torch`.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

VersionOf = Callable[[str], str | None]

XLA_INSTALL = "pip install torch==2.9.0 'torch_xla[tpu]==2.9.0'"  # the last release of torch_xla
TPU_INSTALL = "pip install 'torch>=2.11,<2.16' 'torch_tpu>=0.2' libtpu"
TPU_TORCH_RANGE = ((2, 11), (2, 15))  # the torch releases that torch_tpu 0.2.0 carries glue for
MIN_TORCH = (2, 9)
# What other systems lack of what works on Linux.
LIMITS = {
    "Darwin": (
        "--device cuda, xla and tpu: macOS has none of them; use mps or cpu",
        "torchrun: processes work together on the CPU alone; start one process for mps",
        "a power cut may cost what was written last, which fsync leaves in the drive's cache there",
    )
}
# What the base asks for, in the order that the doctor shows it.
BASE = (
    "torch",
    "transformers",
    "accelerate",
    "numpy",
    "scikit-learn",
    "safetensors",
    "msgspec",
    "lz4",
    "fsspec",
    "aiohttp",
    "huggingface_hub",
    "filelock",
    "datasets",
    "pyarrow",
    "gguf",
    "sentencepiece",
    "tyro",
    "rich",
    "tqdm",
    "matplotlib",
    "wandb",
)
OPTIONAL = (
    "torch_xla",
    "torch_tpu",
    "libtpu",
    "s3fs",
    "gcsfs",
    "mlx",
    "coremltools",
    "compressed-tensors",
    "lm_eval",
)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Something that will not work, and the command that fixes it."""

    what: str
    install: str


def installed_version(name: str) -> str | None:
    """Return a distribution's version, or None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, int]:
    """Return (major, minor) of a version such as `2.9.0+cpu` or `2.16rc1`."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def find_mismatches(version_of: VersionOf = installed_version) -> list[Mismatch]:
    """Return all that is missing or does not fit, the fatal ones first."""
    return [*accelerator_mismatches(version_of), *base_mismatches(version_of)]


def system_mismatches(system: str, machine: str) -> list[Mismatch]:
    """Return why nothing works on a system, as `platform` names it and its processor."""
    if system == "Windows":
        what = "Windows cannot flush folders to the disk, which comes with every file written here"
        return [Mismatch(what, "wsl --install")]
    if (system, machine) == ("Darwin", "x86_64"):
        what = "torch has no release of 2.9 or newer for Macs with Intel processors"
        return [Mismatch(what, "use a Mac with Apple silicon, or Linux")]
    return []


def accelerator_mismatches(version_of: VersionOf = installed_version) -> list[Mismatch]:
    """Return what keeps the TPU back ends from being imported; empty where none is installed."""
    torch, xla, tpu = (version_of(name) for name in ("torch", "torch_xla", "torch_tpu"))
    has_libtpu = version_of("libtpu") is not None
    found = []
    if xla and tpu:
        found.append(
            Mismatch("torch_xla and torch_tpu exclude each other", "pip uninstall torch_xla")
        )
    if torch and xla and release(torch) != release(xla):
        # torch_xla's own metadata does not name a torch, so no installer notices.
        found.append(Mismatch(f"torch {torch} does not fit torch_xla {xla}", XLA_INSTALL))
    if torch and tpu and not TPU_TORCH_RANGE[0] <= release(torch) <= TPU_TORCH_RANGE[1]:
        found.append(Mismatch(f"torch {torch} does not fit torch_tpu {tpu}", TPU_INSTALL))
    if tpu and not has_libtpu:
        found.append(Mismatch("torch_tpu without libtpu ends the process", "pip install libtpu"))
    if xla and not has_libtpu and os.environ.get("PJRT_DEVICE") != "CPU":
        found.append(Mismatch("torch_xla without libtpu sees no TPU", XLA_INSTALL))
    return found


def base_mismatches(version_of: VersionOf = installed_version) -> list[Mismatch]:
    """Return the base packages that are absent or too old."""
    found = [
        Mismatch(f"{name} is not installed", f"pip install {name}")
        for name in BASE
        if version_of(name) is None
    ]
    torch = version_of("torch")
    if torch and release(torch) < MIN_TORCH:
        found.insert(0, Mismatch(f"torch {torch} is older than 2.9", "pip install 'torch>=2.9'"))
    return found


def autoload_aborts(version_of: VersionOf = installed_version) -> bool:
    """Whether `import torch` would end the process: torch_tpu is there and libtpu is not."""
    return version_of("torch_tpu") is not None and version_of("libtpu") is None
