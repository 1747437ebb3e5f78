"""Run an exported file in its runtime and compare it with the student in PyTorch."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qat.data.records import read_text
from qat.evaluate.on_cache import evaluate_on_cache
from qat.export.parity import Runtime, compare_with_runtime
from qat.export.parity_config import ParityConfig
from qat.export.runtimes import CONTEXT_TOKENS, RuntimeModel, open_runtime
from qat.model.load import load_tokenizer
from qat.model.surgery import hold_weights
from qat.pipelines.open_cache import open_teacher_cache
from qat.pipelines.open_checkpoint import open_checkpoint
from qat.tracking.messages import say

SHOWN_NUMBERS = ("kl_nats", "kl_nats_lower", "perplexity", "top1_agreement")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityResult:
    """How far a runtime's logits are from the student's."""

    runtime: str
    """Name of the runtime."""
    prompts: int
    """Prompts compared."""
    positions: int
    """Positions compared: those of all prompts and answers."""
    max_logit_difference: float
    """Largest absolute difference of a logit."""
    kl_nats: float
    """KL(student || runtime), mean over positions."""
    kl_nats_worst: float
    """The same at the position where it is largest."""
    top1_agreement: float
    """Share of positions at which both prefer the same token."""
    same_answers: float
    """Share of prompts whose greedy answers are equal."""
    same_samples: float
    """Share of prompts whose answers sampled with the same noise, at temperature one, are equal."""
    equal_tokens: float
    """Tokens of a greedy answer before the first that differs, mean over prompts."""
    heldout_student: dict[str, Any] | None = None
    """What `qat evaluate` measures of the student on the cache; None without a cache."""
    heldout_runtime: dict[str, Any] | None = None
    """The same of the runtime."""


def check_parity(config: ParityConfig) -> ParityResult:
    """Compare a student with its exported file in the runtime that takes such files."""
    prompts = read_prompts(config)
    name, runtime = open_runtime(config.export)
    opened = open_checkpoint(config.checkpoint, model_id=config.model_id)
    student = opened.load()
    hold_weights(student, torch.float32)
    tokenizer = load_tokenizer(opened.text_folder)
    longest = CONTEXT_TOKENS - config.num_new_tokens
    token_ids = [tokenizer(prompt).input_ids[:longest] for prompt in prompts]
    say(f"{config.export} in {name} against {config.checkpoint}, {len(prompts)} prompts")
    found = compare_with_runtime(
        student, runtime, token_ids, num_new_tokens=config.num_new_tokens, seed=config.seed
    )
    show(prompts, found.pop("rows"))
    heldout = measure_on_cache(config, student, runtime) if config.cache_dir else {}
    return ParityResult(runtime=name, prompts=len(prompts), **found, **heldout)


def measure_on_cache(
    config: ParityConfig, student: nn.Module, runtime: Runtime
) -> dict[str, dict[str, Any]]:
    """Return how far student and runtime are from the teacher on the cache's held-out split."""
    cache = open_teacher_cache(config.cache_dir)
    student_values, runtime_values = (
        evaluate_on_cache(
            model,
            cache,
            device=torch.device("cpu"),
            dtype=torch.float32,
            num_sequences=config.num_sequences,
        )
        for model in (student, RuntimeModel(runtime))
    )
    for name in SHOWN_NUMBERS:
        if student_values.get(name) is not None:
            found = f"{student_values[name]:.4f} in PyTorch, {runtime_values[name]:.4f}"
            say(f"held-out {name}: {found} in the runtime")
    return {"heldout_student": student_values, "heldout_runtime": runtime_values}


def read_prompts(config: ParityConfig) -> list[str]:
    """Return the prompts to compare, in the file's order."""
    lines = read_text(config.prompts).splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {config.prompts} holds no prompt; write one a line")
    count = min(config.num_prompts, len(prompts))
    chosen = random.Random(config.seed).sample(range(len(prompts)), count)
    return [prompts[index] for index in sorted(chosen)]


def show(prompts: list[str], rows: list[dict[str, Any]]) -> None:
    """Print one line a prompt."""
    say(f"{'prompt':<32}{'max logit diff':>15}{'kl_nats':>12}{'top 1':>8}  first differing token")
    for prompt, row in zip(prompts, rows, strict=True):
        differing = row["first_differing_token"]
        say(
            f"{prompt[:30]:<32}{row['max_logit_difference']:>15.3g}{row['kl_nats']:>12.3g}"
            f"{row['top1_agreement']:>8.3f}  {'none' if differing is None else differing}"
        )
