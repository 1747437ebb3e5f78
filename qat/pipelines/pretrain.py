"""A model from a shape and token shards."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from qat.data.text import tokenizer_sha256, vocabulary_size
from qat.data.token_dataset import TokenBlocks, TokenDataset
from qat.data.token_shards import REMEDY, DamagedShards
from qat.model.architectures import count_parameters, new_model, read_architecture
from qat.model.load import load_tokenizer
from qat.pipelines.perplexity import read_domains
from qat.pipelines.place import Place
from qat.pipelines.runs import MeasuredResult
from qat.pipelines.train_dense import DenseResult, DenseRun, run_settings, train_dense
from qat.runtime.device import Device, seeded
from qat.storage.files import fingerprint
from qat.tracking.messages import say
from qat.train import run_folder
from qat.train.copies import RunCopies
from qat.train.pretrain_config import PretrainConfig
from qat.train.pretraining import token_batches

COMMAND = "pretrain"


def pretrain(config: PretrainConfig) -> DenseResult | MeasuredResult:
    """Train a new model on token shards, or find the run already complete.

    Raises:
        ValueError: If shards, shape, settings and folder do not fit each other, the folder is in
            use, or the loss diverged.
        FileNotFoundError: If there are no such shards.
    """
    return train_dense(open_run(config))


def open_run(config: PretrainConfig) -> DenseRun:
    """Look up shards, shape, device and dtype; refuse what does not fit."""
    place, tokens = Place.of(config), TokenDataset.open(config.data_dir)
    shape, blocks_of = shape_for(config, tokens), partial(TokenBlocks, tokens, "train")
    for stage in config.stages():  # refuses shards that hold no block of a stage
        blocks_of(stage.seq_len)
        run_folder.check_share(stage.batch_size)
    length = config.longest
    domains = read_domains(
        config.eval_sets,
        load_tokenizer(tokens.tokenizer_folder),
        window=length,
        stride=max(1, length // 2),
    )
    num_parameters, in_embedding = count_parameters(shape)
    say(
        f"{config.arch}: {num_parameters:,} parameters, {in_embedding:,} of them in the embedding; "
        f"{tokens.num_tokens('train'):,} tokens to train on"
    )
    identity = {
        **run_settings(config, place),
        "model": fingerprint(shape_values(shape)),
        "tokens": tokens.fingerprint,
    }
    copies = RunCopies(config.output_dir, config.tracking.copy_to)
    return DenseRun(
        command=COMMAND,
        config=replace(config, output_dir=copies.folder),
        place=place,
        make_model=partial(drawn_model, shape, place.device, config.seed),
        batches_from=partial(token_batches, blocks_of, config),
        heldout=TokenBlocks(tokens, "heldout", length),
        domains=domains,
        text_folder=tokens.tokenizer_folder,
        identity=identity,
        copies=copies,
    )


def drawn_model(shape: PreTrainedConfig, device: Device, seed: int) -> nn.Module:
    """Return a model of random weights, the same in every process."""
    with seeded(device.torch_device, seed):
        return new_model(shape)


def shape_values(shape: PreTrainedConfig) -> dict[str, Any]:
    """Return a config as JSON, the same by any version of transformers that writes it."""
    values = json.loads(shape.to_json_string())
    return {name: value for name, value in values.items() if name != "transformers_version"}


def shape_for(config: PretrainConfig, tokens: TokenDataset) -> PreTrainedConfig:
    """Return the model's config, with the special tokens of the shards' tokenizer.

    Raises:
        ValueError: If it has too few rows for the tokenizer, or too few positions for a block.
    """
    tokenizer, identity = load_tokenizer(tokens.tokenizer_folder), tokens.manifest.identity
    if tokenizer_sha256(tokenizer) != identity.tokenizer_sha256:
        raise DamagedShards(f"{tokens.tokenizer_folder} is not that of its shards; {REMEDY}")
    if (least := vocabulary_size(tokenizer)) != tokens.manifest.vocab_size:
        raise DamagedShards(f"{tokens.folder} has not the vocabulary of its tokenizer; {REMEDY}")
    shape = read_architecture(config.arch, config.vocab_size)
    text = shape.get_text_config()
    if text.vocab_size < least:
        raise ValueError(
            f"--arch {config.arch} has {text.vocab_size} rows and the tokenizer {least} tokens; "
            f"give --vocab-size {least} or more"
        )
    positions = getattr(text, "max_position_embeddings", None) or config.longest
    if positions < config.longest:
        raise ValueError(
            f"--arch {config.arch} has {positions} positions, blocks have {config.longest} tokens; "
            "give shorter ones"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(shape, name, getattr(tokenizer, name))
    return shape
