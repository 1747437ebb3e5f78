"""A full-precision model tuned on conversations, of which the assistant's tokens count."""

from dataclasses import replace
from functools import partial

from qat.cache.manifest import template_sha256
from qat.data.blocks import Blocks
from qat.data.records import source_revision
from qat.data.text import read_blocks, require_known_ids, tokenizer_sha256
from qat.data.token_dataset import PackedBlocks
from qat.model.checkpoint import read_model_config
from qat.model.load import load_tokenizer, model_identity
from qat.pipelines.open_checkpoint import Checkpoint, open_checkpoint
from qat.pipelines.perplexity import read_domains
from qat.pipelines.place import Place
from qat.pipelines.runs import MeasuredResult
from qat.pipelines.train_dense import DenseResult, DenseRun, run_settings, train_dense
from qat.tracking.messages import say
from qat.train import run_folder
from qat.train.copies import RunCopies
from qat.train.pretraining import token_batches
from qat.train.tune_config import TuneConfig

COMMAND = "tune"


def tune(config: TuneConfig) -> DenseResult | MeasuredResult:
    """Tune a model on instructions, or find the run already complete.

    Raises:
        ValueError: If model, data, settings and folder do not fit each other, the folder is in use,
            or the loss diverged.
        FileNotFoundError: If model or data are not there.
    """
    return train_dense(open_run(config))


def open_run(config: TuneConfig) -> DenseRun:
    """Look up model, data, device and dtype; refuse what does not fit."""
    place, opened = Place.of(config), open_model(config)
    run_folder.check_share(config.batch_size)
    tokenizer = load_tokenizer(opened.text_folder)
    blocks = read_blocks(config.data, tokenizer, config.text, is_whole=True)
    check_blocks(config, opened, blocks)
    say(
        f"{config.model} on {len(blocks) - blocks.num_heldout:,} blocks of {config.data}; "
        f"{int(blocks.loss_mask.sum()):,} of {blocks.token_ids.numel():,} tokens count"
    )
    if blocks.num_cut:
        say(
            f"{blocks.num_cut:,} records are longer than --seq-len {config.seq_len} and lose their "
            "end"
        )
    identity = {
        **run_settings(config, place),
        "model": model_identity(opened.path)["weights"],
        "data": source_revision(config.data),
        "tokenizer": tokenizer_sha256(tokenizer),
        "template": template_sha256(tokenizer),
        "packing": "whole",
    }
    copies = RunCopies(config.output_dir, config.tracking.copy_to)
    return DenseRun(
        command=COMMAND,
        config=replace(config, output_dir=copies.folder),
        place=place,
        make_model=opened.load,
        batches_from=partial(token_batches, lambda _: PackedBlocks(blocks, "train"), config),
        heldout=PackedBlocks(blocks, "heldout"),
        domains=read_domains(
            config.eval_sets, tokenizer, window=config.seq_len, stride=max(1, config.seq_len // 2)
        ),
        text_folder=opened.text_folder,
        identity=identity,
        copies=copies,
    )


def open_model(config: TuneConfig) -> Checkpoint:
    """Return the model to start from; refuse a student."""
    opened = open_checkpoint(config.model)
    if opened.header is not None or not opened.path.is_dir():
        raise ValueError(
            f"--model {config.model} holds quantized weights; `qat train` trains students, give a "
            "full-precision model"
        )
    return opened


def check_blocks(config: TuneConfig, opened: Checkpoint, blocks: Blocks) -> None:
    """Refuse blocks that the model cannot read, and data of which nothing is held out."""
    shape = read_model_config(opened.text_folder).get_text_config()
    require_known_ids(blocks.token_ids, shape.vocab_size, str(opened.text_folder))
    positions = getattr(shape, "max_position_embeddings", None) or config.seq_len
    if positions < config.seq_len:
        raise ValueError(
            f"--seq-len {config.seq_len} is above the {positions} positions of {config.model}; "
            "give shorter blocks"
        )
    if not 0 < blocks.num_heldout < len(blocks):
        raise ValueError(
            f"--data {config.data} gives {len(blocks)} blocks of {config.seq_len} tokens, "
            f"{blocks.num_heldout} of them held out; give more text or a shorter --seq-len"
        )
