from itertools import islice
from pathlib import Path

import pytest
import torch

from qat.cache.read import TeacherCache
from qat.storage.files import write_json
from qat.tracking.record import CONFIG, SUMMARY
from qat.train import run_folder
from qat.train.config import (
    IntervalsConfig,
    LossConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
)
from qat.train.run_folder import (
    check_content,
    check_lengths,
    check_processes,
    finished_run,
    peak_rates,
    rate_at,
    record_of,
    rotate,
    run_identity,
    training_batches,
)
from qat.train.state import Progress
from tests.tiny import tiny_cache


def config(**changes):
    places = {name: Path(name) for name in ("checkpoint", "cache_dir", "output_dir")}
    return TrainConfig(**{**places, **changes})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return TeacherCache.open(tiny_cache(tmp_path_factory.mktemp("cache")))


def identity(**changes):
    return identity_of(config(**changes))


def identity_of(plan, *hashes):
    return run_identity(plan, *(hashes or ("student", "cache")), device_kind="cpu", dtype="fp32")


@pytest.mark.parametrize(
    "changes",
    [
        {"output_dir": Path("elsewhere")},
        {"tracking": TrackingConfig(to="wandb", name="x", tags=("a",), copy_to=Path("drive"))},
        {"intervals": IntervalsConfig(save_steps=7, log_steps=7, keep_checkpoints=2)},
        {"model_id": "somewhere"},
    ],
)
def test_places_and_habits_do_not_decide_a_run(changes):
    """A finished run is found again wherever it lies and whatever it was logged to."""
    assert identity(**changes) == identity()


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": OptimConfig(lr=1e-5)},
        {"seed": 1},
        {"max_steps": 7},
        {"loss": LossConfig(divergence="kd")},
        {"intervals": IntervalsConfig(eval_samples=7)},
    ],
)
def test_settings_decide_a_run(changes):
    """So do the student and the cache that it reads."""
    assert identity(**changes) != identity()
    assert identity_of(config(), "other", "cache") != identity()
    assert identity_of(config(), "student", "other") != identity()
    assert identity_of(config(), "student", "cache", "other") != identity()
    assert identity_of(config(), "student", "cache", "cache") == identity()


def test_a_run_does_not_resume_in_another_dtype_or_on_another_kind_of_device():
    """`auto` was kept unresolved, so float32 and bfloat16 steps could mix in one run."""
    plan, hashes = config(), ("student", "cache")
    here = run_identity(plan, *hashes, device_kind="cpu", dtype="fp32")
    assert run_identity(plan, *hashes, device_kind="cpu", dtype="bf16") != here
    assert run_identity(plan, *hashes, device_kind="cuda", dtype="fp32") != here
    named = config(device="cpu", dtype="fp32")
    assert run_identity(named, *hashes, device_kind="cpu", dtype="fp32") == here


def test_a_run_is_found_by_its_identity(tmp_path):
    """Not there, not ended, ended."""
    record = record_of(config(), identity())
    assert finished_run(tmp_path, identity()) is None
    write_json(tmp_path / CONFIG, record)
    assert finished_run(tmp_path, identity()) is None
    write_json(tmp_path / SUMMARY, {"steps": 3})
    assert finished_run(tmp_path, identity()) == {"steps": 3}


def test_a_run_of_before_a_setting_came_is_found(tmp_path):
    """What it does not name was left at None."""
    record = record_of(config(), identity())
    flat = next(v for v in [record["identity"], *record["identity"].values()] if "formats" in v)
    assert flat.pop("formats") is None
    write_json(tmp_path / CONFIG, record)
    write_json(tmp_path / SUMMARY, {"steps": 3})
    assert finished_run(tmp_path, identity()) == {"steps": 3}
    with pytest.raises(ValueError, match="formats None, this one has"):
        finished_run(tmp_path, identity(formats=("gguf:q2_0",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optim": OptimConfig(lr=1e-5)},
            "holds a run with optim.lr 0.0002, this one has 1e-05; choose another",
        ),
        ({"trainable": ("norms",)}, "holds a run with trainable"),
    ],
)
def test_another_runs_folder_is_refused(tmp_path, changes, message):
    """With the first setting that differs, before anything is written."""
    write_json(tmp_path / CONFIG, record_of(config(), identity()))
    before = (tmp_path / CONFIG).read_bytes()
    with pytest.raises(ValueError, match=message):
        finished_run(tmp_path, identity(**changes))
    assert (tmp_path / CONFIG).read_bytes() == before


def test_a_models_folder_is_no_runs(tmp_path):
    """Its config.json was overwritten, and the model was lost."""
    write_json(tmp_path / CONFIG, {"model_type": "llama"})
    with pytest.raises(ValueError, match="config.json, which is not of a training run: .*; choose"):
        finished_run(tmp_path, identity())


@pytest.mark.parametrize("name", ["best_state_dict.pt", "model.safetensors", "checkpoint.json"])
def test_what_is_not_a_runs_is_not_written_over(tmp_path, name):
    """A file of the seeds without its config.json was replaced by that of the run."""
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(ValueError, match=f"holds {name}, which is not of a training run"):
        finished_run(tmp_path, identity())


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_batches_go_on_where_a_run_stopped(cache, accumulation_steps):
    """From any step on, the same sequences as without the stop, and the same negatives."""
    plan = config(
        batch_size=4,
        accumulation_steps=accumulation_steps,
        seed=3,
        loss=LossConfig(sampled_negatives=8),
    )
    device, size = torch.device("cpu"), {"vocab_size": 5000}
    straight = list(islice(training_batches(cache, plan, device, start_step=0, **size), 30))
    drawn = {tuple(batch.unpack().negative_ids[0, 0].tolist()) for batch in straight}
    assert len(drawn) == 30
    for step in (1, 4):
        resumed = training_batches(cache, plan, device, start_step=step, **size)
        for found, expected in zip(
            islice(resumed, 6), straight[step * accumulation_steps :], strict=False
        ):
            assert torch.equal(found.token_ids, expected.token_ids)
            assert torch.equal(found.document_ids, expected.document_ids)
            signals = found.unpack(), expected.unpack()
            assert torch.equal(*(signal.log_probs for signal in signals))
            assert torch.equal(*(signal.negative_ids for signal in signals))


def test_a_curriculum_cuts_sequences_and_their_signal_alike(cache):
    """Short ones first; the step decides, so a resumed run has the same lengths."""
    plan = config(batch_size=4, accumulation_steps=2, curriculum="6:0,16:2")
    batches = training_batches(cache, plan, torch.device("cpu"), start_step=1)
    first = list(islice(batches, 4))
    parts = [(batch.token_ids, batch.mask, batch.document_ids) for batch in first]
    shapes = [tuple(part.shape[1] for part in each) for each in parts]
    assert shapes == [(6, 5, 6), (6, 5, 6), (16, 15, 16), (16, 15, 16)]
    assert all(batch.unpack().log_probs.shape[:2] == batch.mask.shape for batch in first)


def test_the_text_itself_teaches_where_that_is_asked_for(cache):
    """The label of each position is the next token of the block, whatever the cache holds."""
    plan = config(batch_size=4, loss=LossConfig(divergence="cross-entropy"), curriculum="9:0")
    batch = next(training_batches(cache, plan, torch.device("cpu"), start_step=0))
    signal = batch.unpack()
    assert torch.equal(signal.token_ids[..., 0], batch.token_ids[:, 1:])
    assert torch.equal(signal.mask, batch.mask)
    with pytest.raises(ValueError, match="leave it out with cross-entropy"):
        LossConfig(divergence="cross-entropy", sampled_negatives=4)


def test_a_curriculum_longer_than_the_cache_is_refused():
    """With the flag that builds a longer one."""
    check_lengths(config(curriculum="8:0,16:5"), 16)
    with pytest.raises(ValueError, match="reaches length 32, the cache has blocks of 16.*seq-len"):
        check_lengths(config(curriculum="8:0,32:5"), 16)


def test_candidates_need_token_ids():
    """A hidden cache names none; its full logits are what it is for."""
    check_content(config(), "hidden")
    plan = config(loss=LossConfig(sampled_negatives=8))
    for content in ("top-k", "sampled", "conditional"):
        check_content(plan, content)
    with pytest.raises(
        ValueError, match="--loss.sampled-negatives 8 needs a cache of token ids.*--content"
    ):
        check_content(plan, "hidden")


def test_rates_are_shares_of_one():
    """Each part's peak is a ratio of --lr; each rollback halves what a step takes."""
    optim = OptimConfig(scale_lr_ratio=0.5, codebook_lr_ratio=2.0, norm_lr_ratio=0.1)
    assert peak_rates(optim, 1e-3) == {
        "weights": 1e-3,
        "scales": 5e-4,
        "directions": 5e-4,
        "magnitudes": 5e-4,
        "codebooks": 2e-3,
        "norms": 1e-4,
    }
    plan = config(optim=OptimConfig(schedule="constant", warmup_steps=0))
    assert rate_at(plan, Progress(step=5)) == 1.0
    assert rate_at(plan, Progress(step=5, rollbacks=2)) == 0.25


def test_old_students_make_room_for_the_last(tmp_path):
    """The last two stay; 0 keeps all; other folders are nobody's business."""
    for step in (5, 10, 100):
        (tmp_path / f"step_{step:07d}").mkdir()
    (tmp_path / "notes").mkdir()
    rotate(tmp_path, 0)
    assert len(list(tmp_path.iterdir())) == 4
    rotate(tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir()} == {"step_0000010", "step_0000100", "notes"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "fp16"}, "--shard with --dtype fp16: loss scales are of one process; use bf16"),
        ({"optim": OptimConfig(averages="8bit")}, "--shard with --optim.averages 8bit: a scale"),
        (
            {"form_weights": "in-use", "gradient_checkpointing": True},
            "--shard with --form-weights in-use: it gathers them in use; use one",
        ),
    ],
)
def test_what_rows_cannot_have_is_refused(monkeypatch, changes, said):
    """One process takes it, and so do several with copies."""
    cpu = torch.device("cpu")
    check_processes(config(shard=True, **changes), cpu)
    monkeypatch.setattr(run_folder, "num_processes", lambda: 2)
    check_processes(config(**changes), cpu)
    with pytest.raises(ValueError, match=said):
        check_processes(config(shard=True, **changes), cpu)


def test_chips_hold_rows_without_being_told(monkeypatch):
    """Processes on XLA are of several hosts, each of which splits rows over its own chips."""
    monkeypatch.setattr(run_folder, "num_processes", lambda: 2)
    xla = torch.device("xla")
    check_processes(config(), xla)
    with pytest.raises(ValueError, match="--shard with --device xla: the chips of a host hold"):
        check_processes(config(shard=True), xla)
