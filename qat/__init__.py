"""Quantization-aware distillation of small causal language models.

The Python API is `compress`, and its parts `build_cache`, `quantize`, `train`, `evaluate` and
`export`, with their configs and results. Names are imported when they are first used, so that
`import qat` loads no torch.

Layers, lowest first; a module imports lower layers or its own folder only:

0. `runtime`, `storage`
1. `grids`, `quant`, `distill`
2. `tracking`, `data`, `model`, `cache`, `calibrate`
3. `train`, `evaluate`, `benchmark`, `export`, `legacy`, `reports`
4. `pipelines`
5. `cli`

Read `qat/pipelines/train.py` first: it is the story of a run.
"""

import sys
from importlib import import_module
from types import ModuleType

TYPE_CHECKING = False  # type checkers read it as True; importing `typing` costs milliseconds
if TYPE_CHECKING:
    from qat.pipelines.api import build_cache, compress, evaluate, export, quantize, train

__version__ = "0.1.0"
__all__ = ["build_cache", "compress", "evaluate", "export", "quantize", "train"]
MODULE_OF = {
    **dict.fromkeys(__all__, "qat.pipelines.api"),
    "BuildCacheConfig": "qat.cache.config",
    "BuildCacheResult": "qat.pipelines.build_cache",
    "CompressConfig": "qat.pipelines.compress_config",
    "CompressResult": "qat.pipelines.compress",
    "InitStudentConfig": "qat.pipelines.quantize_config",
    "StudentResult": "qat.pipelines.students",
    "TrainConfig": "qat.train.config",
    "TrainResult": "qat.pipelines.train",
    "EvaluateConfig": "qat.evaluate.config",
    "EvaluateResult": "qat.pipelines.evaluate",
    "ExportConfig": "qat.export.config",
    "ExportResult": "qat.pipelines.export",
}


def __getattr__(name: str) -> object:
    """Return a name of the Python API, imported now."""
    if name not in MODULE_OF:
        raise AttributeError(f"module 'qat' has no attribute {name!r}")
    return getattr(import_module(MODULE_OF[name]), name)


def __dir__() -> list[str]:
    """Return what is here and what would be imported."""
    return sorted({*globals(), *MODULE_OF})


class _Package(ModuleType):
    """Keeps `qat.train` the function: Python would set it to the folder of that name.

    `from qat.train.loop import ...` finds the folder all the same.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
