"""`qat generate`: answers to prompts, or to the rows of an instruction file."""

import time
from collections.abc import Sequence
from typing import Any

from qat.cli.command import run_command
from qat.evaluate.generate_config import GenerateConfig
from qat.tracking.messages import say


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat generate", GenerateConfig, generate, argv)


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Answer prompts or rows; return the closing values."""
    import torch

    from qat.evaluate.generate import Decoding, answer_file, generate_texts, read_rows
    from qat.model.load import load_tokenizer
    from qat.model.surgery import hold_weights
    from qat.pipelines.open_checkpoint import load_model, open_checkpoint
    from qat.runtime.device import Device, dtype_name

    if config.data is not None:
        read_rows(config.data)
    device = Device.detect(config.device).eager()  # every token is another shape
    dtype = device.dtype_from_name(config.dtype)
    say(device.describe())
    opened = open_checkpoint(config.checkpoint, model_id=config.model_id)
    tokenizer = load_tokenizer(opened.text_folder)
    model, header = load_model(config.checkpoint, model_id=config.model_id, dtype=dtype)
    hold_weights(model.to(device.torch_device), dtype)
    say(f"{config.checkpoint}: {'student' if header else 'dense model'}, {dtype_name(dtype)}")
    if config.template == "chat" and not tokenizer.chat_template:
        say("the tokenizer has no chat template: prompts are continued as they are")

    settings = {
        name: getattr(config, name)
        for name in ("max_new_tokens", "temperature", "batch_size", "template")
    }
    decoding = Decoding(**settings)
    torch.manual_seed(config.seed)
    started = time.perf_counter()
    if config.data is None:
        answers = dict(generate_texts(model, tokenizer, config.prompt, decoding))
        pairs = [{"prompt": text, "answer": answers[n]} for n, text in enumerate(config.prompt)]
        for pair in pairs:
            say(f"\n> {pair['prompt']}\n{pair['answer']}")
        return {"answers": pairs, "seconds": round(time.perf_counter() - started, 3)}
    counts = answer_file(
        config.data,
        config.output,
        lambda prompts: generate_texts(model, tokenizer, prompts, decoding),
        settings={
            **settings,
            "checkpoint": str(config.checkpoint),
            "dtype": dtype_name(dtype),
            "seed": config.seed,
        },
        overwrite_outputs=config.overwrite_outputs,
    )
    seconds = round(time.perf_counter() - started, 3)
    return {"output": str(config.output), **counts, "seconds": seconds}


if __name__ == "__main__":
    raise SystemExit(main())
