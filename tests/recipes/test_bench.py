"""`qat bench` on a tiny model: every ratio and duration comes from a real process."""

import json

import pytest

from qat.cli.commands import main
from tests.tiny import save_tiny, tiny_llama, tiny_records, write_jsonl

pytestmark = pytest.mark.recipe


def test_all_ratios_are_measured(tmp_path, capsys):
    """One repeat of one step; a tiny model tells nothing, so only signs are checked."""
    model = save_tiny(tmp_path / "model", tiny_llama())
    data = write_jsonl(tmp_path / "records.jsonl", tiny_records(64))
    flags = ["--model-id", model, "--data", data, "--seq-len", 16, "--tokens-per-step", 64]
    flags += ["--steps", 1, "--repeats", 1, "--num-sequences", 64, "--device", "cpu"]
    assert main("bench", [str(flag) for flag in [*flags, "--dtype", "fp32"]]) == 0
    closing = json.loads(capsys.readouterr().out)
    names = ("step_time_over_plain", "rate_over_rank_by_rank", "peak_memory_over_plain")
    names += ("conversion_seconds", "default_conversion_seconds", "cache_over_bare_forward")
    assert all(closing[name] > 0 for name in names)
    assert closing["tokens_per_step"] == 64
    assert set(closing["seconds"]) == {"plain", "fake-quant", "rank-by-rank", "formed"}
