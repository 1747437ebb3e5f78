"""Quantization-aware distillation of small causal language models.

Floors, lowest first; a module imports lower floors or its own folder only:

0. ground: `device`, `files`, `archive`, `tracking`
1. math: `quant`, `distill`, `text`
2. things: `model`, `cache`, `calibration`
3. acts: `convert`, `train`, `evaluate`, `benchmark`, `export`
4. doors: `commands`

Read `qat/commands/train.py` first: it is the story of a run.
"""

__version__ = "0.1.0"
