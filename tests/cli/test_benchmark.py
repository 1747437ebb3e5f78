import json
import shlex

import pytest

from qat.benchmark.config import BenchmarkConfig
from qat.cli.command import parse_flags
from qat.pipelines.batch_probe import describe, measure
from qat.pipelines.benchmark import arguments, command
from qat.runtime.device import Device

SEEDS = (
    "--cache-dir caches/x --find-max-batch",
    "--cache-dir caches/x --find-max-batch --dtype bf16 --load-model FILE",
    "--cache-dir caches/x --dtype bf16 --batch-sizes 16 --steps 50",
    "--cache-dir caches/x --find-max-batch --batch-sizes 8,16 --steps 3 --dtype fp32 "
    "--model-id m --save-model FILE --skip-baseline --no-gradient-checkpointing --mode e2e "
    "--seq-len 64 --memory-limit 6 --probe 1",
)
QUICK = {"device": "cpu", "dtype": "fp32"}


@pytest.mark.parametrize("line", SEEDS)
def test_the_seeds_words_are_taken(line):
    """And a process that is started by a config gets the same config."""
    config = parse_flags("qat benchmark", BenchmarkConfig, line.split())
    again = arguments(config)
    assert again[:3] == ["-m", "qat", "benchmark"]
    assert parse_flags("qat benchmark", BenchmarkConfig, again[3:]) == config
    typed = shlex.split(command(config).replace("\\\n", " "))
    assert typed[:2] == ["python", "speedrun/benchmark.py"]


def test_configurations_follow_from_the_flags():
    """Both, or one; none is refused."""
    assert BenchmarkConfig().configurations == {"baseline": False, "checkpointing": True}
    assert BenchmarkConfig(gradient_checkpointing=False).configurations == {"baseline": False}
    assert BenchmarkConfig(skip_baseline=True).configurations == {"checkpointing": True}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"skip_baseline": True, "gradient_checkpointing": False}, "nothing to measure"),
        ({"batch_sizes": "8,,16"}, "--batch-sizes 8,,16"),
        ({"batch_sizes": "0"}, "--batch-sizes 0"),
        ({"steps": 0}, "--steps 0"),
        ({"memory_limit": 0.0}, "--memory-limit 0.0"),
        ({"load_model": "a", "save_model": "b"}, "--save-model b"),
    ],
)
def test_flags_that_contradict_are_refused(flags, said):
    """With the value."""
    with pytest.raises(ValueError, match=said):
        BenchmarkConfig(**flags)


@pytest.mark.recipe
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["mlp", "e2e"])
def test_a_probe_does_real_work(path, mode, checkpointing):
    """Steps that warm up and steps that count, a loss, memory; more layers multiply more."""
    config = BenchmarkConfig(
        cache_dir=path.cache,
        load_model=str(path.q2),
        mode=mode,
        probe=3,
        steps=2,
        gradient_checkpointing=checkpointing,
        **QUICK,
    )
    row = measure(config, Device.detect("cpu"))
    assert len(row["seconds"]) == 2
    assert row["warm_up_seconds"] > 0
    assert 0 < row["step_bytes"] <= row["peak_bytes"]
    assert row["loss"] > 0
    attention, mlp, head = 2 * 12_288, 2 * 24_576, 64 * 272  # weights of the tiny Llama
    trained = {"mlp": mlp, "e2e": attention + mlp}[mode]
    assert row["flops_per_token"] == 4 * (attention + mlp + head) + 2 * trained


@pytest.mark.recipe
def test_what_is_measured_is_described(path, tmp_path):
    """Student, cache, length; the student that was made can be measured again."""
    config = BenchmarkConfig(
        cache_dir=path.cache, model_id=str(path.teacher), save_model=tmp_path / "made", **QUICK
    )
    facts = describe(config)
    identity = json.loads(json.dumps(facts["identity"]))
    assert (identity["seq_len"], identity["dtype"], identity["mode"]) == (16, "fp32", "mlp")
    assert identity["model"]["name"] == "teacher"
    assert facts["peak_flops"] is None
    assert facts["total_bytes"] > 0
    again = BenchmarkConfig(load_model=str(tmp_path / "made"), probe=1, seq_len=8, **QUICK)
    assert describe(again)["key"] != facts["key"]
    assert measure(again, Device.detect("cpu"))["loss"] > 0


@pytest.mark.recipe
def test_what_cannot_be_measured_is_told(path, tmp_path, refused):
    """On one line, before anything is measured."""
    folder = {"output_dir": tmp_path / "out", "probe": 0}
    assert "no student" in refused("benchmark", load_model=path.teacher, **folder)
    assert "longer than the cache" in refused(
        "benchmark", cache_dir=path.cache, model_id=path.teacher, seq_len=64, **folder
    )
    assert "does not exist" in refused("benchmark", cache_dir=tmp_path / "none", **folder)
    assert not (tmp_path / "out").exists()
