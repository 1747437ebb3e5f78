"""How long a training step takes here, told by a few steps that leave nothing behind."""

import statistics
import time

from qat.pipelines.open_checkpoint import latent_or_base_weights
from qat.pipelines.train import open_run
from qat.train.config import TrainConfig
from qat.train.run_folder import make_trainer, training_batches

NUM_STEPS = 5
WARM_UP_STEPS = 2  # the first makes the optimizer's state, so the second is another graph


def rehearse_training(config: TrainConfig) -> float:
    """Return the seconds of a training step, after a warm-up; nothing is written."""
    run = open_run(config)
    device = run.place.device
    model = run.student.load(dtype=run.place.dtype)
    device.place(model)
    header = run.student.header
    base = config.model_id or header.base_model["path"]
    weight_of = latent_or_base_weights(run.student, {**header.base_model, "path": base})
    trainer = make_trainer(config, model, run.place.dtype, weight_of=weight_of, sync=device.sync)
    batches = training_batches(
        run.cache, config, device.torch_device, 0, vocab_size=model.config.vocab_size
    )
    seconds = []
    for _ in range(NUM_STEPS):
        parts = [next(batches) for _ in range(config.accumulation_steps)]
        device.sync(wait=True)
        started = time.perf_counter()
        trainer.step(parts, 0.0)
        device.sync(wait=True)
        seconds.append(time.perf_counter() - started)
    return statistics.mean(seconds[WARM_UP_STEPS:])
