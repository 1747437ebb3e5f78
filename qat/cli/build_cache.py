"""`qat build-cache`: a teacher and a data set to a cache, found again when it is there."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from qat.cache.config import BuildCacheConfig
from qat.cli.command import run_command
from qat.tracking.messages import say


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat build-cache", BuildCacheConfig, build, argv)


def build(config: BuildCacheConfig) -> dict[str, Any]:
    """Build the cache, or find it whole; return the closing values."""
    from qat.cache.build import BuildRates, build_cache, default_batch_size, find_built
    from qat.cache.manifest import default_name, draft_manifest, wanted_identity
    from qat.data.records import source_name
    from qat.data.text import read_blocks
    from qat.model.load import load_dense, load_tokenizer, model_identity
    from qat.runtime.device import Device, dtype_name

    data_name = source_name(config.data)  # first, so that a wrong path is told at once
    device = Device.detect(config.device)
    dtype = device.dtype_from_name(config.dtype)
    say(device.describe())
    tokenizer = load_tokenizer(config.teacher)
    named = model_identity(config.teacher)  # of files, so a finished cache is found without loading
    identity = wanted_identity(
        config, tokenizer=tokenizer, teacher_weights=named["weights"], dtype=dtype_name(dtype)
    )
    folder = config.output_dir / (config.name or default_name(identity, data_name))
    manifest, rates = find_built(folder, identity), BuildRates(None, None)
    if manifest:
        say(f"{folder} is whole: nothing to do")
    else:
        blocks = read_blocks(config.data, tokenizer, text_plan(config, tokenizer))
        say(f"{len(blocks)} blocks of {config.seq_len} tokens, {blocks.num_heldout} held out")
        teacher = load_dense(config.teacher, dtype=dtype)
        device.place(teacher)
        manifest, rates = build_cache(
            teacher,
            blocks,
            draft_manifest(
                identity,
                teacher_name=named["name"],
                data_name=data_name,
                vocab_size=teacher.get_output_embeddings().weight.shape[0],
            ),
            folder,
            batch_size=config.batch_size or default_batch_size(device, config.seq_len),
            device=device,
        )
    return {
        "cache": str(folder),
        "tokens": manifest.num_tokens,
        "bytes_per_token": manifest.bytes_per_token,
        "head_bytes": manifest.head_bytes,
        "tokens_per_second": rates.tokens_per_second,
        "bare_forward_tokens_per_second": rates.bare_forward_tokens_per_second,
        "fingerprint": manifest.fingerprint,
    }


def text_plan(config: BuildCacheConfig, tokenizer: Any) -> Any:
    """Return how the text becomes blocks; tell of a template that has no thinking."""
    from qat.data.text import TextPlan, ignores_thinking

    if config.thinking != "none" and tokenizer.chat_template and ignores_thinking(tokenizer):
        say(f"this chat template ignores enable_thinking: {config.thinking} renders the same once")
    names = [field.name for field in fields(TextPlan)]
    return TextPlan(**{name: getattr(config, name) for name in names})


if __name__ == "__main__":
    raise SystemExit(main())
