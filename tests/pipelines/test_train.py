from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from qat.pipelines.train import train
from qat.tracking.record import SETTINGS, config_from_json, read_config, read_summary
from qat.train.config import IntervalsConfig, OptimConfig, TrainConfig
from tests.tiny import save_student, tiny_cache, tiny_llama, tiny_student


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A short run on a tiny student and its teacher's cache."""
    folder = tmp_path_factory.mktemp("train")
    cache = tiny_cache(folder, tiny_llama())
    base = {"path": str(folder / "teacher"), "name": "teacher", "weights": None}
    student = save_student(folder / "q2", tiny_student(), folder / "teacher", base_model=base)
    return TrainConfig(
        checkpoint=student,
        cache_dir=cache,
        output_dir=folder / "run",
        max_steps=2,
        batch_size=2,
        device="cpu",
        dtype="fp32",
        optim=OptimConfig(lr=1e-3),
        intervals=IntervalsConfig(log_steps=1, eval_samples=2),
    )


def test_a_run_is_a_function_from_its_config_to_its_result(config):
    """The summary on disk is the result, the record gives the config; the caller's generator stays.

    A second call finds the run complete.
    """
    torch.manual_seed(3)
    state = torch.get_rng_state()
    result = train(config)
    assert torch.equal(torch.get_rng_state(), state)
    values = asdict(result)
    assert values.pop("checkpoint") == str(config.output_dir / "best")
    assert values == read_summary(config.output_dir)
    assert config_from_json(TrainConfig, read_config(config.output_dir)[SETTINGS]) == config
    assert train(config) == result


def test_a_full_precision_model_is_refused(config):
    """With the command that makes a student of it."""
    teacher = Path(config.checkpoint).parent / "teacher"
    with pytest.raises(ValueError, match="is a full-precision model; `qat init-student` makes"):
        train(replace(config, checkpoint=teacher))
