"""`qat parity`: an exported file in its runtime against the student in PyTorch."""

import random
from collections.abc import Sequence
from typing import Any

from qat.cli.command import run_command
from qat.export.parity_config import ParityConfig
from qat.tracking.messages import say


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat parity", ParityConfig, act, argv)


def act(config: ParityConfig) -> dict[str, Any]:
    """Load student and runtime, compare, show a table."""
    prompts = read_prompts(config)

    import torch

    from qat.export.parity import compare_with_runtime
    from qat.export.runtimes import CONTEXT_TOKENS, open_runtime
    from qat.model.load import load_tokenizer
    from qat.model.surgery import hold_weights
    from qat.pipelines.open_checkpoint import load_model, open_checkpoint

    name, runtime = open_runtime(config.export)
    opened = open_checkpoint(config.checkpoint, model_id=config.model_id)
    student, _header = load_model(config.checkpoint, model_id=config.model_id)
    hold_weights(student, torch.float32)
    tokenizer = load_tokenizer(opened.text_folder)
    longest = CONTEXT_TOKENS - config.num_new_tokens
    token_ids = [tokenizer(prompt).input_ids[:longest] for prompt in prompts]
    say(f"{config.export} in {name} against {config.checkpoint}, {len(prompts)} prompts")
    found = compare_with_runtime(student, runtime, token_ids, num_new_tokens=config.num_new_tokens)
    show(prompts, found.pop("rows"))
    return {"runtime": name, "prompts": len(prompts), **found, **held_out(config, student, runtime)}


def held_out(config: ParityConfig, student: Any, runtime: Any) -> dict[str, Any]:
    """Return how far both are from the teacher's word; empty without a cache."""
    if config.cache_dir is None:
        return {}
    import torch

    from qat.evaluate.on_cache import evaluate_on_cache
    from qat.export.runtimes import RuntimeModel
    from qat.pipelines.open_cache import open_teacher_cache

    cache = open_teacher_cache(config.cache_dir)
    measured = [
        evaluate_on_cache(
            model,
            cache,
            device=torch.device("cpu"),
            dtype=torch.float32,
            num_sequences=config.num_sequences,
        )
        for model in (student, RuntimeModel(runtime))
    ]
    for name in ("kl_nats", "perplexity", "top1_agreement"):
        say(f"held-out {name}: {measured[0][name]:.4f} in PyTorch, {measured[1][name]:.4f} there")
    return {"heldout_student": measured[0], "heldout_runtime": measured[1]}


def read_prompts(config: ParityConfig) -> list[str]:
    """Return the prompts to compare, in the file's order.

    Raises:
        ValueError: If the file holds none.
    """
    lines = config.prompts.read_text(encoding="utf-8").splitlines()
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


if __name__ == "__main__":
    raise SystemExit(main())
