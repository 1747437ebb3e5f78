import pytest
import torch
from torch.nn import functional

from qat.evaluate.on_text import evaluate_on_text
from tests.tiny import tiny_llama, tiny_student

CPU = torch.device("cpu")


def blocks(count=5, length=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(261, (count, length), generator=generator)


def measure(model, teacher, ids, **changes):
    return evaluate_on_text(model, teacher, ids, device=CPU, dtype=torch.float32, **changes)


def test_the_distance_is_over_the_whole_vocabulary():
    """Exact KL from the live teacher on every position, perplexity on every token."""
    student, teacher, ids = tiny_student(), tiny_llama(), blocks()
    found = measure(student, teacher, ids)
    log_p = teacher(ids).logits.log_softmax(-1)
    log_q = student(ids).logits.log_softmax(-1)
    exact = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    nll = -log_q[:, :-1].gather(-1, ids[:, 1:].unsqueeze(-1)).mean()
    assert found["kl_nats"] == pytest.approx(exact.item(), rel=1e-4)
    assert found["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-4)
    assert found["tokens"] == 5 * 8


def test_without_a_teacher_there_is_perplexity_only():
    """Distances are null, not zero."""
    found = measure(tiny_student(), None, blocks())
    known = {name for name, value in found.items() if value is not None}
    assert known == {"perplexity", "perplexity_stderr", "tokens"}
    assert found["perplexity"] == pytest.approx(
        measure(tiny_student(), tiny_llama(), blocks())["perplexity"]
    )


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_changes_no_number(batch_size):
    """It bounds memory only."""
    usual = measure(tiny_student(), tiny_llama(), blocks())
    found = measure(tiny_student(), tiny_llama(), blocks(), batch_size=batch_size)
    assert found == {
        name: value and pytest.approx(value, rel=1e-4) for name, value in usual.items()
    }


def test_context_does_not_count():
    """The prediction at BOS is left out; the tokens after it are as they are."""
    student, teacher, ids = tiny_student(), tiny_llama(), blocks()
    found = measure(student, teacher, ids, num_context=1)
    log_p, log_q = (m(ids).logits[:, 1:].log_softmax(-1) for m in (teacher, student))
    exact = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    nll = -log_q[:, :-1].gather(-1, ids[:, 2:].unsqueeze(-1)).mean()
    assert found["kl_nats"] == pytest.approx(exact.item(), rel=1e-4)
    assert found["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-4)


def test_no_block_is_refused():
    """A text that is too short says so."""
    with pytest.raises(ValueError, match="--text is shorter than one block; give more text"):
        measure(tiny_student(), None, blocks(0))


def test_another_vocabulary_is_refused():
    """Logits of different widths have no distance; the message gives both."""
    with pytest.raises(ValueError, match="--teacher has a vocabulary of 300, the student of 272"):
        measure(tiny_student(), tiny_llama(vocab_size=300), blocks())
