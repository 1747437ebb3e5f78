"""Quantization-aware distillation of small causal language models.

Layers, lowest first; a module imports lower layers or its own folder only:

0. `runtime`, `storage`
1. `grids`, `quant`, `distill`
2. `tracking`, `data`, `model`, `cache`, `calibrate`
3. `train`, `evaluate`, `benchmark`, `export`, `legacy`, `reports`
4. `pipelines`
5. `cli`

Read `qat/commands/train.py` first: it is the story of a run.
"""

__version__ = "0.1.0"
