"""The Python API of evaluation, and its numbers against those of a program that shares no code."""

import contextlib
import io
import json
import runpy
import sys
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import pytest
import torch

from qat.evaluate.config import EvaluateConfig
from qat.export.to_gguf import export_to_gguf
from qat.pipelines.evaluate import evaluate
from tests.tiny import (
    save_student,
    save_tiny,
    tiny_gemma,
    tiny_llama,
    tiny_student,
    tiny_task,
)

JUDGE = Path(__file__).parents[2].parent / "shared" / "tools" / "kl.py"
NEEDS_JUDGE = pytest.mark.skipif(not JUDGE.is_file(), reason=f"the judge {JUDGE} is not here")
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


def judged(teacher, text, student):
    """Return what the independent program says of a student, by its whole logits."""
    words = [JUDGE, teacher, text, student, "--seq-len", "16"]
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", [str(word) for word in words])
        runpy.run_path(str(JUDGE))
    return json.loads(out.getvalue().splitlines()[-1])


def require_agreement(found, judge):
    """Compare every number that the program rounds."""
    assert found.tokens == judge["tokens"]
    assert found.kl_nats == pytest.approx(judge["kl_nats"], abs=1e-5)
    assert found.kl_nats > 0.01
    assert found.kl_p99 == pytest.approx(judge["kl_p99"], abs=1e-4)
    assert found.top1_agreement == pytest.approx(judge["top1"], abs=1e-4)
    assert found.perplexity == pytest.approx(judge["ppl"], abs=1e-3)


@pytest.mark.recipe
@NEEDS_JUDGE
def test_the_numbers_are_those_of_an_independent_judge(folders):
    """KL, its tail, agreement and perplexity from whole logits, by a program of its own."""
    paths = {name: folders / name for name in ("teacher", "student")}
    found = evaluate(
        EvaluateConfig(
            checkpoint=str(paths["student"]),
            teacher=str(paths["teacher"]),
            text=folders / "text.txt",
            **QUICK,
        )
    )
    require_agreement(found, judged(paths["teacher"], folders / "text.txt", paths["student"]))


@pytest.mark.recipe
@NEEDS_JUDGE
def test_the_same_holds_for_a_gguf_file(tmp_path):
    """Read by us, and by transformers for the judge; its bits are the file's."""
    teacher = save_tiny(tmp_path / "teacher", tiny_llama())
    text, file = tmp_path / "text.txt", tmp_path / "student.gguf"
    text.write_text(TEXT)
    student = tiny_student("llama", "gguf:q4_0")
    export_to_gguf(student, file, text_source=teacher, head="q8_0")
    config = EvaluateConfig(
        checkpoint=str(file), model_id=str(teacher), teacher=str(teacher), text=text, **QUICK
    )
    found = evaluate(config)
    require_agreement(found, judged(teacher, text, file))
    assert 4.5 < found.bits_per_weight_model < 8.5


@pytest.mark.parity
def test_tasks_of_a_gguf_file_are_those_of_its_student(tmp_path):
    """Read back by us; the number of solved examples and the bits are a part of the result."""
    base = save_tiny(tmp_path / "base", tiny_llama())
    student = tiny_student("llama", "gguf:q4_0")
    save_student(tmp_path / "student", student, base, plan="gguf:q4_0")
    export_to_gguf(student, tmp_path / "student.gguf", text_source=base, head="f16")
    tasks, quick = (str(tiny_task(tmp_path)),), {"device": "cpu", "dtype": "fp32"}
    found = [
        evaluate(
            EvaluateConfig(
                checkpoint=str(path), model_id=str(base), tasks=tasks, num_fewshot=1, **quick
            )
        )
        for path in (tmp_path / "student", tmp_path / "student.gguf")
    ]
    assert found[0].tasks == found[1].tasks
    assert found[0].tasks["animals"]["num_fewshot"] == 1
    assert not found[0].bos
    assert found[0].lm_eval >= "0.4.13"
    assert found[0].bits_per_weight < 5


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
