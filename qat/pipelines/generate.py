"""Answer prompts, or fill in the answers of an instruction file."""

import time
from dataclasses import dataclass

import torch

from qat.evaluate.generate import Decoding, answer_file, generate_texts, read_rows
from qat.evaluate.generate_config import GenerateConfig
from qat.model.load import load_tokenizer
from qat.model.surgery import hold_weights
from qat.pipelines.open_checkpoint import open_checkpoint
from qat.pipelines.place import Place
from qat.runtime.device import dtype_name
from qat.tracking.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateResult:
    """Answers to prompts, or where the answered rows are."""

    answers: list[dict[str, str]] | None = None
    """Prompt and answer of each prompt; None where a file was answered."""
    output: str | None = None
    """The answered file, as are the counts that follow; None where prompts were."""
    rows: int | None = None
    answered: int | None = None
    """Rows that were answered in this call."""
    kept: int | None = None
    """Rows that had an output."""
    resumed: int | None = None
    """Rows that an interrupted call had answered."""
    seconds: float


def generate(config: GenerateConfig) -> GenerateResult:
    """Load a model and answer with it."""
    if config.data is not None:
        read_rows(config.data)
    place = Place.of(config)
    device, dtype = place.device.eager(), place.dtype  # every token is another shape
    opened = open_checkpoint(config.checkpoint, model_id=config.model_id)
    tokenizer = load_tokenizer(opened.text_folder)
    model = opened.load(dtype=dtype)
    hold_weights(model.to(device.torch_device), dtype)
    say(
        f"{config.checkpoint}: {'student' if opened.header else 'dense model'}, {dtype_name(dtype)}"
    )
    if config.template == "chat" and not tokenizer.chat_template:
        say("the tokenizer has no chat template: prompts are continued as they are")

    names = ("max_new_tokens", "temperature", "batch_size", "template")
    settings = {name: getattr(config, name) for name in names}
    decoding = Decoding(**settings)
    torch.manual_seed(config.seed)
    started = time.perf_counter()
    if config.data is None:
        answers = dict(generate_texts(model, tokenizer, config.prompt, decoding))
        pairs = [{"prompt": text, "answer": answers[n]} for n, text in enumerate(config.prompt)]
        for pair in pairs:
            say(f"\n> {pair['prompt']}\n{pair['answer']}")
        return GenerateResult(answers=pairs, seconds=round(time.perf_counter() - started, 3))
    made_by = {"checkpoint": str(config.checkpoint), "dtype": dtype_name(dtype)}
    counts = answer_file(
        config.data,
        config.output,
        lambda prompts: generate_texts(model, tokenizer, prompts, decoding),
        settings={**settings, **made_by, "seed": config.seed},
        overwrite_outputs=config.overwrite_outputs,
    )
    seconds = round(time.perf_counter() - started, 3)
    return GenerateResult(output=str(config.output), **counts, seconds=seconds)
