"""Which runtime takes a file, and that it measures as the student does."""

import pytest
import torch

from qat.export import runtimes
from qat.export.parity import compare_with_runtime
from qat.export.runtimes import RuntimeModel, open_runtime
from qat.export.to_gguf import export_to_gguf
from qat.export.to_hf import export_to_hf
from qat.model.head import hidden_states, logits_of
from tests.tiny import save_tiny, tiny_llama, tiny_student

PROMPTS = [[72, 68, 65], [5, 6, 7, 8]]


def itself(student):
    """Return the student as a runtime."""
    return lambda ids: student(torch.tensor([ids])).logits[0].numpy()


def test_a_dense_folder_runs_in_transformers(tmp_path):
    """To the bit: it is the same arithmetic."""
    text_source = save_tiny(tmp_path / "base", tiny_llama())
    export_to_hf(tiny_student(), tmp_path / "a", text_source=text_source, dtype=torch.float32)
    name, runtime = open_runtime(tmp_path / "a")
    found = compare_with_runtime(tiny_student(), runtime, PROMPTS, num_new_tokens=3)
    assert name == "transformers"
    assert found["max_logit_difference"] == 0


def test_what_does_not_run_here_is_said(tmp_path, monkeypatch):
    """A missing path, a folder without a model, a runtime that is not installed."""
    with pytest.raises(FileNotFoundError, match="run `qat export` first"):
        open_runtime(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no model that runs here"):
        open_runtime(tmp_path / "empty")
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    text_source = save_tiny(tmp_path / "base", tiny_llama())
    for plan in ("gguf:q4_0", "gguf:q2_0"):
        student = tiny_student("llama", plan)
        export_to_gguf(student, tmp_path / f"{plan}.gguf", text_source=text_source)
        with pytest.raises(ValueError, match="pip install xllamacpp"):
            open_runtime(tmp_path / f"{plan}.gguf")


def test_a_runtime_runs_packed_documents_one_by_one():
    """It takes no mask; each document in a pass of its own gives what a mask would."""
    student, token_ids = tiny_student(), torch.arange(16).view(2, 8)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [3] * 8])
    found = hidden_states(RuntimeModel(itself(student)), token_ids, documents)
    expected = logits_of(student, hidden_states(student, token_ids, documents))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    whole = hidden_states(RuntimeModel(itself(student)), token_ids)
    torch.testing.assert_close(whole, student(token_ids).logits, atol=1e-5, rtol=1e-5)
