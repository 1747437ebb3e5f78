import json
import sys

import pytest

from qat.tracking.record import read_config, read_rows, read_summary
from qat.tracking.sinks import Tracker, open_tracker, run_id, start_wandb


class ListSink:
    """Keeps what it is given."""

    def __init__(self):
        self.rows, self.summary = [], None

    def log(self, step, values):
        self.rows.append((step, dict(values)))

    def finish(self, summary):
        self.summary = dict(summary)


def test_every_sink_gets_the_same_numbers():
    """One call reaches all sinks, and so does the summary."""
    first, second = ListSink(), ListSink()
    track = Tracker([first, second])
    track(1, {"train/loss": 2.0})
    track.finish({"steps": 1})
    assert first.rows == second.rows == [(1, {"train/loss": 2.0})]
    assert first.summary == second.summary == {"steps": 1}


def test_the_folder_alone_when_wandb_is_not_asked_for(tmp_path, monkeypatch):
    """Without --wandb nothing imports wandb and the three files are there."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    track = open_tracker(tmp_path, {"lr": 0.1})
    track(1, {"train/loss": 2.0})
    track.finish({"steps": 1})
    assert read_config(tmp_path) == {"lr": 0.1}
    assert read_rows(tmp_path) == [{"step": 1, "train/loss": 2.0}]
    assert read_summary(tmp_path) == {"steps": 1}


def test_wandb_absent_is_one_line_with_the_remedy(monkeypatch):
    """A machine without wandb, as Colab's TPU image is, is told what to install."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        start_wandb(project="p")


def test_the_id_is_kept_for_resume_and_new_for_a_fresh_start(tmp_path):
    """Resuming continues the same W&B run; starting over does not."""
    path = tmp_path / "wandb.json"
    first = run_id(path, resume=True)
    assert run_id(path, resume=True) == first
    assert run_id(path, resume=False) != first


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"id": 3}', '{"id": "a/b"}', '{"id": ""}'])
def test_a_damaged_id_is_refused(tmp_path, content):
    """W&B would end on it in its own words, or begin another run."""
    path = tmp_path / "wandb.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"wandb\.json.*; |wandb\.json is not JSON"):
        run_id(path, resume=True)


@pytest.mark.recipe
def test_offline_wandb_holds_the_keys_that_hugging_face_users_know(tmp_path, monkeypatch):
    """A real offline run stores keys, steps, config and summary, and resumes under its id."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {"project": "tests", "name": "tiny", "group": "g", "tags": ["q2a4"]}
    track = open_tracker(tmp_path, {"lr": 0.1}, wandb=options)
    for step in (1, 2):
        track(step, {"train/loss": 1.0 / step, "train/learning_rate": 0.1, "eval/kl_nats": 3.0})
    track.finish({"best_kl_nats": 3.0})
    resumed = open_tracker(tmp_path, {"lr": 0.1}, resume_step=2, wandb=options)
    resumed(3, {"train/loss": 0.2})
    resumed.finish({"best_kl_nats": 2.0})

    kept = json.loads((tmp_path / "wandb.json").read_text())["id"]
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{kept}.wandb"))
    assert files, "the offline run is stored under the kept id"
    stored = b"".join(file.read_bytes() for file in files)
    for key in (b"train/global_step", b"train/loss", b"train/learning_rate", b"eval/kl_nats"):
        assert key in stored
    assert b"best_kl_nats" in stored


def test_tensorboard_holds_the_same_keys_and_steps(tmp_path):
    """Read back by TensorBoard itself; a resumed run's repeated steps are there once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track = open_tracker(tmp_path, {"lr": 0.1}, tensorboard=True)
    for step in (1, 2, 3):
        track(step, {"train/loss": 1.0 / step, "eval/perplexity": 3})
    resumed = open_tracker(tmp_path, {"lr": 0.1}, resume_step=1, tensorboard=True)
    resumed(2, {"train/loss": 0.25})
    resumed.finish({"steps": 2})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "eval/perplexity"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.25)]


def test_tensorboard_absent_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    """It is no dependency of a run that does not ask for it."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        open_tracker(tmp_path, {}, tensorboard=True)
    open_tracker(tmp_path, {})
