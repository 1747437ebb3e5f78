from dataclasses import replace

import pytest
import torch

from qat.legacy.fp16_snap import snap_student
from qat.legacy.run_files import why_no_seed_files, write_seed_files
from qat.pipelines.open_checkpoint import load_model
from qat.storage.files import write_json
from qat.tracking.record import CONFIG, read_config
from tests.tiny import plan_of, save_student, save_tiny, tiny_llama, tiny_student


@pytest.mark.parametrize(
    ("name", "came_in_theirs", "is_written"),
    [("q2a4_r8", False, True), ("q4_r4", True, True), ("q2a4", False, False), ("q2a4", True, True)],
)
def test_low_rank_scales_and_files_of_theirs_are_written(name, came_in_theirs, is_written):
    """Groups take as many ranks as a row has groups; who brought such a file wants one back."""
    why = why_no_seed_files(plan_of(tiny_llama(), name).to_dict(), came_in_theirs=came_in_theirs)
    assert (why is None) == is_written


def test_floored_scales_are_not_written():
    """With the command that makes a student which can be."""
    plan = plan_of(tiny_llama(), "q2a4_r8")
    floored = plan.changed(lambda spec: spec.with_scale(replace(spec.scale, floor=1e-8)))
    why = why_no_seed_files(floored.to_dict(), came_in_theirs=True)
    assert "qat convert-v1-to-v2" in why


def write(folder, snap=lambda student: None, time="20260101_120000"):
    return write_seed_files(
        folder,
        best="best",
        last="final",
        model_id=str(folder / "base"),
        time=time,
        weight_of=lambda _name: None,
        snap=snap,
    )


@pytest.fixture
def folder(tmp_path):
    """A run of a preset's sizes, ended."""
    base = save_tiny(tmp_path / "base", tiny_llama())
    for name in ("best", "final"):
        save_student(tmp_path / name, tiny_student("llama", "q4_r4"), base, plan="q4_r4")
    write_json(tmp_path / CONFIG, {"config": {"model_id": None}, "identity": {"cache": "x"}})
    return tmp_path


@pytest.mark.recipe
def test_names_are_those_of_the_seeds(folder):
    """The preset's name where sizes are a preset's; an earlier end's files are replaced."""

    def snap(student):
        snap_student(student, bake=True)

    write(folder, snap, time="20250101_120000")
    names = write(folder, snap)
    assert names == [
        "best_state_dict.pt",
        "v2_q4a4_fp32_20260101_120000.pt",
        "v2_q4a4_fp16_20260101_120000.pt",
    ]
    assert sorted(path.name for path in folder.glob("*.pt")) == sorted(names)
    config = read_config(folder)
    assert config["identity"] == {"cache": "x"}
    assert config["config"] == {"model_id": None}  # as asked for: theirs is at the top
    assert (config["config_preset"], config["model_id"]) == ("q4a4", str(folder / "base"))
    token_ids = torch.arange(12).view(2, 6)
    expected = load_model(folder / "final")[0](token_ids).logits
    for name in names:
        found = load_model(folder / name)[0](token_ids).logits
        assert torch.allclose(found, expected, atol=1e-4 if "fp16" not in name else 0.1)


def test_what_float16_does_not_hold_has_no_file_of_it(folder):
    """The others are there; a run does not fail in its last second."""

    def refuse(_student):
        raise ValueError("weights beyond 65504")

    assert write(folder, refuse) == ["best_state_dict.pt", "v2_q4a4_fp32_20260101_120000.pt"]
