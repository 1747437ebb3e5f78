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


def test_hours_of_a_shape_are_predicted(run, refused):
    """Without a folder; a file of one has no tokenizer to count."""
    done = run("plan", model="tiny-15m", tokens=1e9, mfu=0.5, device=None)
    assert done.code == 0, done.said
    hours = done.closing["hours"]["H100"]
    assert 0 < hours["cache_hours"] < hours["pretrain_hours"] < hours["distil_hours"]
    assert "assumed: 50% of the makers' peak rates" in done.said
    assert "--tokens nan is no count" in refused("plan", model="tiny-15m", tokens="nan")
    assert "counts a tokenizer" in refused("plan", model="tiny-15m", to="gguf", device=None)


def test_memory_is_predicted_where_it_is_asked_for(run, tmp_path):
    """A row for each command, of rows of weights less than of copies; the KV cache in float16."""
    folder = save_tiny(tmp_path / "m", tiny_llama())
    assert run("plan", model=folder).closing["memory"] is None
    done = run("plan", model=folder, memory=True, processes=2)
    assert done.code == 0, done.said
    memory = done.closing["memory"]
    assert {"quantize", "build-cache", "train", "layer-wise", "evaluate"} < memory.keys()
    assert memory["train, --shard on 2"] < memory["train, copies on 2"]
    layers, kv_heads, head_dim, context = 2, 2, 16, 256
    assert done.closing["kv_cache_bytes"] == 2 * 2 * layers * kv_heads * head_dim * context
    assert "assumed: fp32, batches of 8 x 64 tokens" in done.said
