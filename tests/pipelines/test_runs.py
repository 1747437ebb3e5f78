import json

import pytest

from qat.pipelines.runs import held_folder
from qat.runtime.device import Device
from qat.train.config import TrackingConfig, TrainConfig
from qat.train.copies import RunCopies
from qat.train.run_folder import record_of

IDENTITY = {"settings": {"max_steps": 2}, "model": "a"}


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        checkpoint=tmp_path / "student",
        cache_dir=tmp_path / "cache",
        output_dir=tmp_path / "run",
        tracking=TrackingConfig(copy_to=tmp_path / "drive"),
    )


def held(config, identity=IDENTITY):
    copies = RunCopies(config.output_dir, config.tracking.copy_to)
    return held_folder(config, identity, Device.detect("cpu"), copies)


def leave(config, name, values):
    config.output_dir.mkdir(exist_ok=True)
    (config.output_dir / name).write_text(json.dumps(values))


@pytest.mark.recipe
def test_a_folder_is_of_one_run_at_a_time(config):
    """Another is refused, and so is one of other numbers afterwards; places may differ."""
    with held(config) as summary:
        assert summary is None
        with pytest.raises(ValueError, match="is in use by process"), held(config):
            pass
        record = record_of(config, {**IDENTITY, "settings": {"max_steps": 2, "eval_sets": ["x"]}})
        leave(config, "config.json", record)
    with held(config) as summary:
        assert summary is None
    other = {**IDENTITY, "model": "b"}
    with (
        pytest.raises(ValueError, match="holds a run with model a, this one has b"),
        held(config, other),
    ):
        pass


def test_a_finished_run_is_found_and_copied(config):
    """With its summary."""
    with held(config):
        leave(config, "config.json", record_of(config, IDENTITY))
        leave(config, "summary.json", {"steps": 2})
    with held(config) as summary:
        assert summary == {"steps": 2}
    assert sorted(path.name for path in config.tracking.copy_to.iterdir()) == [
        "config.json",
        "summary.json",
    ]
