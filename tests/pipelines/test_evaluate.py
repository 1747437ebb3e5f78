"""The Python API of evaluation, and its numbers against those of a program that shares no code."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import pytest
import torch

from qat.evaluate.config import EvaluateConfig
from qat.pipelines.evaluate import evaluate
from tests.tiny import save_tiny, tiny_gemma, tiny_llama

JUDGE = Path(__file__).parents[2].parent / "shared" / "tools" / "kl.py"
TEXT = "the cat sees a red boat and two small birds near the old mill, " * 12
QUICK = {"device": "cpu", "dtype": "fp32", "seq_len": 16}


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gemma])
def folders(request, tmp_path_factory):
    """A teacher, a student that is the teacher with noise on its weights, and a text."""
    folder = tmp_path_factory.mktemp("models")
    teacher, student = request.param(), request.param()
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    save_tiny(folder / "teacher", teacher)
    save_tiny(folder / "student", student)
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.mark.skipif(not JUDGE.is_file(), reason=f"the judge {JUDGE} is not here")
def test_the_numbers_are_those_of_an_independent_judge(folders):
    """KL, its tail, agreement and perplexity from whole logits, by a program of its own."""
    words = [folders / "teacher", folders / "text.txt", folders / "student", "--seq-len", "16"]
    done = subprocess.run(
        [sys.executable, JUDGE, *words], capture_output=True, text=True, check=True
    )
    judged = json.loads(done.stdout.splitlines()[-1])
    found = evaluate(
        EvaluateConfig(
            checkpoint=str(folders / "student"),
            teacher=str(folders / "teacher"),
            text=folders / "text.txt",
            **QUICK,
        )
    )
    assert found.tokens == judged["tokens"]
    assert found.kl_nats == pytest.approx(judged["kl_nats"], abs=1e-5)
    assert found.kl_nats > 0.01
    assert found.kl_p99 == pytest.approx(judged["kl_p99"], abs=1e-4)
    assert found.top1_agreement == pytest.approx(judged["top1"], abs=1e-4)
    assert found.perplexity == pytest.approx(judged["ppl"], abs=1e-3)


def test_the_result_is_frozen_and_ordered(folders):
    """Its fields are the closing line's keys; the quantiles of the KL rise."""
    config = EvaluateConfig(
        checkpoint=str(folders / "student"),
        teacher=str(folders / "teacher"),
        text=folders / "text.txt",
        **QUICK,
    )
    found = evaluate(config)
    names = ("kl_median", "kl_p90", "kl_p95", "kl_p99", "kl_p999", "kl_max")
    quantiles = [asdict(found)[name] for name in names]
    assert quantiles == sorted(quantiles)
    assert 0 < found.kl_stderr < found.kl_nats
    assert found.bits_per_weight is None
    with pytest.raises(FrozenInstanceError):
        found.kl_nats = 0.0
