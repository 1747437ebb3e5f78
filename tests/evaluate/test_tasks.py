"""Tasks of lm-eval on models in memory, against a loop over the answers of each question."""

import sys
from pathlib import Path

import pytest
import torch

from qat.data.text import bos_id
from qat.evaluate.tasks import as_number, load_tasks, measure_tasks
from tests.tiny import (
    QUESTIONS,
    tiny_llama,
    tiny_student,
    tiny_task,
    tiny_tokenizer,
    with_bos,
)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A multiple-choice task on local data, as a YAML file."""
    return str(tiny_task(tmp_path_factory.mktemp("task")))


def accuracy(model, tokenizer, *, is_per_letter=False):
    """Return the share of questions whose own answer is the likeliest, one answer at a time."""
    right = 0
    for item in QUESTIONS:
        scores = []
        for choice in item["choices"]:
            context = tokenizer(item["question"]).input_ids
            ids = torch.tensor([tokenizer(f"{item['question']} {choice}").input_ids])
            log_probs = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
            places = range(len(context), ids.shape[1])
            score = float(sum(log_probs[place - 1, ids[0, place]] for place in places))
            scores.append(score / len(choice) if is_per_letter else score)
        right += scores.index(max(scores)) == item["label"]
    return right / len(QUESTIONS)


def measured(model, tokenizer, task, **changes):
    options = {"num_fewshot": None, "num_examples": None, "batch_size": 2}
    return measure_tasks(model, tokenizer, load_tasks([task]), **{**options, **changes})["animals"]


@pytest.mark.parity
@pytest.mark.parametrize("has_bos", [False, True])
def test_the_numbers_are_those_of_a_loop_over_answers(task, has_bos):
    """The likeliest answer, whole or per letter, after BOS where the tokenizer puts it."""
    tokenizer = with_bos(tiny_tokenizer()) if has_bos else tiny_tokenizer()
    assert (bos_id(tokenizer) is not None) == has_bos
    for seed in range(3):
        model = tiny_llama(seed=seed)
        found = measured(model, tokenizer, task)
        assert found["acc"] == pytest.approx(accuracy(model, tokenizer))
        assert found["acc_norm"] == pytest.approx(accuracy(model, tokenizer, is_per_letter=True))
    assert found["examples"] == 5
    assert found["version"] == 3.0
    assert found["num_fewshot"] == 0
    assert 0 < found["acc_stderr"] < 1


@pytest.mark.parity
@torch.no_grad()
def test_a_student_is_measured_as_it_is(task):
    """Its head, which shares the quantized embedding, stays; solved examples change prompts."""
    student = tiny_student("llama", "q2a4, embed=int4-g32")
    head = student.get_output_embeddings()
    found = measured(student, tiny_tokenizer(), task)
    assert found["acc"] == pytest.approx(accuracy(student, tiny_tokenizer()))
    assert student.get_output_embeddings() is head
    assert "tie_weights" not in vars(student)
    fewer = measured(student, tiny_tokenizer(), task, num_fewshot=2, num_examples=1)
    assert (fewer["num_fewshot"], fewer["examples"], fewer["acc_stderr"]) == (2, 1, None)


@pytest.mark.parity
def test_what_is_no_task_is_refused(task, tmp_path):
    """In one line that says what to do, before a model is loaded."""
    broken = tmp_path / "broken.yaml"
    broken.write_text("group: [")
    with pytest.raises(ValueError, match=r"broken.yaml cannot be read .*; correct the task's file"):
        load_tasks([str(broken)])
    broken.write_text(Path(task).read_text().replace("questions.jsonl", "absent.jsonl"))
    with pytest.raises(FileNotFoundError, match="data is not within reach .*absent.jsonl"):
        load_tasks([str(broken)])


def test_without_the_library_its_install_line_is_told(task, monkeypatch):
    """At once."""
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match="--tasks needs lm-eval, which is absent: pip install"):
        load_tasks([task])


def test_only_an_error_may_be_no_number():
    """A metric that is not finite is the student's fault and is shown."""
    assert as_number("acc_stderr", float("nan")) is None
    assert as_number("acc_stderr", "N/A") is None
    assert as_number("perplexity", float("inf")) == float("inf")
