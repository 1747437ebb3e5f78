"""The comparison of a runtime with the student: what it counts, on runtimes made up here."""

import math

import numpy as np
import pytest
import torch

from qat.export.parity import (
    answer_of,
    answer_with_runtime,
    compare_with_runtime,
    gumbel_noise,
)
from tests.tiny import tiny_student

PROMPTS = [[72, 68, 65], [5, 6, 7, 8]]


def itself(student):
    """Return the student as a runtime."""
    return lambda ids: student(torch.tensor([ids])).logits[0].numpy()


def test_a_runtime_that_is_the_student_differs_nowhere():
    """Zero everywhere, and no token that differs."""
    student = tiny_student()
    found = compare_with_runtime(student, itself(student), PROMPTS, num_new_tokens=5)
    assert found["max_logit_difference"] == found["kl_nats"] == found["kl_nats_worst"] == 0
    assert found["top1_agreement"] == found["same_answers"] == 1
    assert found["positions"] == 3 + 4 + 2 * 4
    assert [row["first_differing_token"] for row in found["rows"]] == [None, None]
    assert (found["same_samples"], found["equal_tokens"]) == (1, 5)


def test_a_known_change_gives_its_known_distance():
    """One logit of one position raised by x: KL = log(1 - p + p e^x) - p x by definition."""
    student = tiny_student()
    answer, logits = answer_of(student, PROMPTS[0], 3)
    second = int(logits[3].topk(2).indices[1])

    def changed(ids):
        found = np.array(itself(student)(ids))
        found[3, second] += 30
        return found

    row = compare_with_runtime(student, changed, PROMPTS[:1], num_new_tokens=3)["rows"][0]
    p = float(logits[3].double().softmax(-1)[second])
    expected = math.log1p(p * math.expm1(30)) - p * 30
    assert row["kl_nats_worst"] == pytest.approx(expected, rel=1e-4)
    assert row["kl_nats"] == pytest.approx(expected / 5, rel=1e-4)
    assert row["max_logit_difference"] == pytest.approx(30, abs=1e-4)
    assert row["first_differing_token"] == 1  # position 3 chooses the answer's second token
    assert row["top1_agreement"] == pytest.approx(4 / 5)
    assert answer[1] != second


def test_samples_are_of_the_softmax():
    """The largest noisy logit is each token as often as its probability says."""
    logits = torch.tensor([2.0, 1.0, 0.0, -3.0])
    drawn = (logits + gumbel_noise((40_000, 4), seed=0)).argmax(-1)
    shares = drawn.bincount(minlength=4) / len(drawn)
    assert torch.allclose(shares, logits.softmax(-1), atol=0.01)


def test_sampled_answers_differ_where_a_runtime_is_another_model():
    """The same noise, other logits."""
    student = tiny_student()
    found = compare_with_runtime(
        student, lambda ids: -itself(student)(ids), PROMPTS, num_new_tokens=8
    )
    assert found["same_samples"] < 1
    assert found["equal_tokens"] < 8


def test_a_runtime_answers_greedily_up_to_an_end():
    """As the student itself does; the token that ends the answer is left out."""
    student = tiny_student()
    answer, _ = answer_of(student, PROMPTS[0], 6)
    assert answer_with_runtime(itself(student), PROMPTS[0], 6, []) == answer
    end = answer[3]
    assert answer_with_runtime(itself(student), PROMPTS[0], 6, [end]) == answer[: answer.index(end)]
