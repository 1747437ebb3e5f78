"""`qat evaluate`: measure a student."""

from collections.abc import Sequence
from typing import Any

from qat.cli.command import run_command
from qat.evaluate.config import EvaluateConfig
from qat.tracking.messages import say


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat evaluate", EvaluateConfig, act, argv)


def act(config: EvaluateConfig) -> dict[str, Any]:
    """Load, measure, report."""
    import torch

    from qat.model.checkpoint import bits_per_weight, dense_parts_in
    from qat.pipelines.open_checkpoint import load_model, open_checkpoint
    from qat.runtime.device import Device

    device = Device.detect(config.device)
    dtype = device.dtype_from_name(config.dtype)
    say(device.describe())
    is_student = open_checkpoint(config.checkpoint, model_id=config.model_id).header is not None
    # A student's few dense parts are loaded as they are stored, so that their bits are counted.
    loaded = torch.float32 if is_student else dtype
    model, _header = load_model(config.checkpoint, model_id=config.model_id, dtype=loaded)
    sizes = bits_per_weight(model)
    measure = on_cache if config.cache_dir else on_text
    with dense_parts_in(model, dtype), device.hosting(model):
        return measure(model, config, device, dtype) | sizes


def on_cache(model: Any, config: EvaluateConfig, device: Any, dtype: Any) -> dict[str, Any]:
    """Measure on a cache that is of the same tokenizer and vocabulary."""
    from qat.evaluate.on_cache import evaluate_on_cache
    from qat.pipelines.students import open_cache

    cache = open_cache(config.cache_dir, text_folder(config), model.config.vocab_size)
    return evaluate_on_cache(
        model,
        cache,
        device=device.torch_device,
        dtype=dtype,
        num_sequences=config.num_sequences,
        batch_size=config.batch_size,
    )


def on_text(model: Any, config: EvaluateConfig, device: Any, dtype: Any) -> dict[str, Any]:
    """Measure on a text file, against a teacher where one is given."""
    from qat.data.text import text_blocks
    from qat.evaluate.on_text import evaluate_on_text
    from qat.model.load import load_tokenizer
    from qat.pipelines.open_checkpoint import load_model

    tokenizer = load_tokenizer(text_folder(config))
    blocks = text_blocks(config.text, tokenizer, config.seq_len, config.num_sequences)
    teacher = None
    if config.teacher:
        teacher, _header = load_model(config.teacher, dtype=dtype)
        device.place(teacher)
    return evaluate_on_text(
        model,
        teacher,
        blocks,
        device=device.torch_device,
        dtype=dtype,
        batch_size=config.batch_size,
    )


def text_folder(config: EvaluateConfig) -> Any:
    """Return the folder of the checkpoint's tokenizer."""
    from qat.pipelines.open_checkpoint import open_checkpoint

    return open_checkpoint(config.checkpoint, model_id=config.model_id).text_folder
