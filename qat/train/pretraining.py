"""A new model's training: what a step works with, and its micro-batches from token shards."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from qat.data.token_dataset import PackedBlocks, TokenBatch, TokenBlocks, shuffled_indices
from qat.distill.objective import TEXT_LOSS, make_divergence
from qat.distill.teacher import text_signal
from qat.model.sharding import spread_dense_rows
from qat.runtime.device import lay_out, loader_settings, num_chips
from qat.runtime.distributed import share
from qat.train.config import RateConfig
from qat.train.dense_config import DenseConfig
from qat.train.ema import MovingAverage
from qat.train.step import Batch, Trainer, loss_scaler
from qat.train.trainable import (
    choose_dense,
    compile_decoder_layers,
    enable_gradient_checkpointing,
    make_optimizer,
)


def make_pretrainer(
    config: DenseConfig, model: nn.Module, dtype: torch.dtype, *, sync: Callable[[], None]
) -> Trainer:
    """Let all of a float32 model train and return what a step works with."""
    optim, chosen = config.optim, choose_dense(model)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    compile_decoder_layers(model, config.compile)
    parameters = [parameter for part in chosen.values() for parameter in part]
    if num_chips(parameters[0].device) > 1:
        spread_dense_rows(model)
    return Trainer(
        model=model,
        layers=[],
        optimizer=make_optimizer(
            chosen,
            dict.fromkeys(chosen, optim.lr),
            optim.weight_decay,
            betas=optim.betas,
            averages=optim.averages,
        ),
        divergence=make_divergence(TEXT_LOSS),
        dtype=dtype,
        clip_grad_norm=optim.clip_grad_norm,
        sync=sync,
        ema=moving_average(optim, parameters),
        scaler=loss_scaler(parameters[0].device, dtype),
        autocast_dtype=None if dtype == torch.float32 else dtype,
    )


def moving_average(optim: RateConfig, parameters: list[nn.Parameter]) -> MovingAverage | None:
    """Return the moving average that is asked for, if one is."""
    return MovingAverage(parameters, optim.ema_decay) if optim.ema_decay else None


def own_indices(batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield this process's share of each micro-batch's blocks."""
    for whole in batches:
        yield whole[share(range(len(whole)))]


def as_it_is(batch: TokenBatch) -> TokenBatch:
    """Return a batch that was read as one."""
    return batch


def token_batches(
    blocks_of: Callable[[int], TokenBlocks | PackedBlocks],
    config: DenseConfig,
    device: torch.device,
    start_step: int,
) -> Iterator[Batch]:
    """Yield micro-batches on the device without end, from the first of a step on.

    Each stage of the curriculum goes through blocks of its own length, which `blocks_of` gives, in
    an order of its own. Of several processes each gets its share of every micro-batch.
    """
    stages, count = config.stages(), config.accumulation_steps
    ends = [stage.first_step for stage in stages[1:]]
    for place, (stage, end) in enumerate(zip(stages, [*ends, None], strict=True)):
        first = max(start_step, stage.first_step)
        if end is not None and first >= end:
            continue
        blocks = blocks_of(stage.seq_len)
        indices = shuffled_indices(
            len(blocks),
            stage.batch_size,
            [config.seed, place],
            start_batch=(first - stage.first_step) * count,
        )
        number = None if end is None else (end - first) * count
        loader: DataLoader[TokenBatch] = DataLoader(
            blocks,
            batch_sampler=own_indices(islice(indices, number)),
            collate_fn=as_it_is,
            generator=torch.Generator(),  # of its own: the draws of a run stay those of its steps
            **loader_settings(device),
        )
        for batch in loader:
            token_ids, document_ids, mask = (
                lay_out(ids.to(device, non_blocking=True), split=True) for ids in batch
            )
            yield Batch(
                token_ids=token_ids,
                mask=mask,
                document_ids=document_ids if config.documents == "separate" else None,
                unpack=partial(text_signal, token_ids, mask),
                num_sequences=stage.batch_size,
            )
