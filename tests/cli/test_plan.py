"""`qat plan`: formats and bytes of a model from its config alone."""

import json

from tests.tiny import plan_of, save_tiny, tiny_llama

PLAN = "all=gguf:q4_0, mlp=gguf:q8_0"


def test_the_plan_that_is_saved_is_the_plan_of_the_model(run, tmp_path):
    """The table adds up, and `--plan FILE.json` gives every tensor the same format."""
    folder, file = save_tiny(tmp_path / "m", tiny_llama()), tmp_path / "plan.json"
    done = run("plan", model=folder, plan=PLAN, save=file, device=None)
    assert done.code == 0, done.said
    expected = plan_of(tiny_llama(), PLAN)
    assert done.closing["file_bytes"] == done.closing["tensor_bytes"] == expected.file_bytes
    assert sum(row["bytes"] for row in done.closing["rows"]) == expected.file_bytes
    assert json.loads(file.read_text()) == expected.to_dict()
    assert plan_of(tiny_llama(), str(file)) == expected


def test_a_plan_that_does_not_fit_is_refused(refused, tmp_path):
    """Before anything is written."""
    folder = save_tiny(tmp_path / "m", tiny_llama())
    flags = {"model": folder, "save": tmp_path / "plan.json", "device": None}
    assert "group size 48 does not divide" in refused("plan", plan="q4_g48", **flags)
    assert not (tmp_path / "plan.json").exists()
