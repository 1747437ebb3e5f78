"""Measure our fits against ggml's own quantizer, weighted by the same importances.

Gaussian weights; errors are relative to the weights' weighted power. Needs `libggml-python`.
"""

from dataclasses import dataclass
from typing import Any

from qat.cli.command import run_command

IMPORTANCES = ("even", "uniform", "steep")


@dataclass(frozen=True, kw_only=True, slots=True)
class GgmlFitsConfig:
    """Fit one weight in several GGUF formats and compare errors, ours over ggml's."""

    formats: tuple[str, ...] = ()
    """Names such as q4_0; all that ggml fits if none is given."""
    rows: int = 256
    """Of the weight."""
    inputs: int = 1024
    """Of the weight."""


def measure_fits(config: GgmlFitsConfig) -> dict[str, Any]:
    """Fit by both, dequantize, compare."""
    import torch

    from qat.export.ggml import errors_of_both, open_ggml, random_importance
    from qat.grids.blocks import TAILED
    from qat.quant.spec import FORMATS

    library = open_ggml()
    torch.manual_seed(0)
    weight = torch.randn(config.rows, config.inputs) * 0.02
    importances = {kind: random_importance(kind, config.inputs) for kind in IMPORTANCES}
    known = [name.removeprefix("gguf:") for name in FORMATS if name.startswith("gguf:")]
    known = [name for name in known if name not in TAILED]  # which ggml lacks
    table = {}
    for name in config.formats or known:
        table[name] = {}
        for kind, importance in importances.items():
            ours, theirs = errors_of_both(library, weight, name, importance)
            table[name][kind] = {
                "ours": float(f"{ours:.4g}"),
                "ggml": float(f"{theirs:.4g}"),
                "ratio": round(ours / theirs, 3),
            }
    return table


if __name__ == "__main__":
    command = "python speedrun/ggml_fits.py"
    raise SystemExit(run_command(command, GgmlFitsConfig, measure_fits))
