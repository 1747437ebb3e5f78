"""Ratios follow from what the processes say; a case is timed in this one."""

import pytest

from qat.benchmark.config import BenchConfig
from qat.pipelines import bench as module
from qat.pipelines.bench import CASES, bench, in_fresh_process
from tests.tiny import save_tiny, tiny_llama

STEPS = {"plain": 2.0, "fake-quant": 3.0, "rank-by-rank": 8.0, "formed": 4.0}
CONVERSIONS = {"moments": 5.0, "hessian": 50.0}


def test_ratios_are_of_medians(monkeypatch, tmp_path):
    """Of all repeats; a slow one moves none. Every case and stage is asked for once a repeat."""
    asked = []

    def answer(command, flags):
        asked.append((command, flags.get("case") or flags.get("fit")))
        if command == "build-cache":
            return {"cache": "c", "tokens_per_second": 90.0, "bare_forward_tokens_per_second": 100}
        if command != "bench":
            return {"seconds": CONVERSIONS[flags["fit"]]}
        seconds = STEPS[flags["case"]]
        slow = 100 * seconds if len(asked) <= len(CASES) else seconds
        return {"seconds": [seconds, slow, seconds], "tokens": 8, "peak_bytes": seconds * 100}

    monkeypatch.setattr(module, "in_fresh_process", answer)
    found = bench(BenchConfig(model_id=str(tmp_path), repeats=2, tokens_per_step=64))
    assert found.step_time_over_plain == found.peak_memory_over_plain == 1.5
    assert found.rate_over_rank_by_rank == 2
    assert found.cache_over_bare_forward == pytest.approx(0.9)
    assert (found.conversion_seconds, found.default_conversion_seconds) == (5.0, 50.0)
    assert found.seconds == STEPS
    assert found.tokens_per_step == 64
    cases = [case for command, case in asked if command == "bench"]
    assert cases == [*CASES, *CASES]
    assert asked[8:] == [
        ("build-cache", None),
        ("init-student", "moments"),
        ("convert-q4-to-q2", "moments"),
        ("convert-q4-to-q2", "hessian"),
    ]


def test_a_process_without_memory_is_an_error(monkeypatch):
    """It names the command; other answers are passed on."""
    monkeypatch.setattr(module, "run_fresh", lambda _words: {"status": "OOM", "why": "killed"})
    with pytest.raises(ValueError, match="qat bench does not fit into memory: killed"):
        in_fresh_process("bench", {"case": "plain"})
    monkeypatch.setattr(module, "run_fresh", lambda words: {"words": list(words)})
    words = in_fresh_process("bench", {"case": "plain", "steps": 1})["words"]
    assert words[:3] == ["-m", "qat", "bench"]
    assert {"--case", "plain", "--steps"} <= set(words)


@pytest.mark.parametrize(("case", "tokens"), [("fake-quant", 64), ("formed", 32)])
def test_a_case_is_timed_in_this_process(tmp_path, case, tokens):
    """Steps after the warm-up; comparisons of ranks take the seeds' batch."""
    model = str(save_tiny(tmp_path / "m", tiny_llama()))
    config = BenchConfig(
        model_id=model,
        seq_len=8,
        tokens_per_step=64,
        steps=2,
        case=case,
        device="cpu",
        dtype="fp32",
    )
    found = bench(config)
    assert (found["case"], found["tokens"]) == (case, tokens)
    assert len(found["seconds"]) == 2
    assert min(found["seconds"]) > 0
    assert found["peak_bytes"] > 0
