from functools import partial

import pytest
import torch

from qat.model.checkpoint import student_tensors
from qat.model.head import hidden_states, logits_of
from qat.model.sharding import gather_in_use, split_parameters, split_rows
from qat.model.surgery import quantized_layers, thaw_indices
from qat.runtime import distributed
from qat.runtime.device import Device
from tests.processes import forked
from tests.tiny import tiny_student

pytestmark = pytest.mark.recipe
TOKEN_IDS = torch.arange(12).view(2, 6)


def split_and_back(tied):
    """Return what three processes make of a student: logits, its file's tensors, their own rows."""
    with distributed.joined(Device.detect("cpu")), torch.no_grad():
        student = tiny_student("llama", "q2a4, embed=int4-g32", tied=tied)
        split_rows(student)
        for layer in quantized_layers(student).values():
            thaw_indices(layer)
        gather_in_use(student, torch.float32)
        logits = logits_of(student, hidden_states(student, TOKEN_IDS))
        rows = {name: len(p) for name, p in student.named_parameters() if p in split_of(student)}
        return logits, student_tensors(student), rows


def split_of(student):
    """Return the parameters that are split."""
    return split_parameters(student).keys()


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_all_processes_make_up_the_student(tied):
    """The same logits and the same file; 64 rows are no multiple of three."""
    student = tiny_student("llama", "q2a4, embed=int4-g32", tied=tied)
    expected = logits_of(student, hidden_states(student, TOKEN_IDS))
    tensors = student_tensors(student)
    parts = forked(3, partial(split_and_back, tied))
    for logits, found, _ in parts:
        assert torch.allclose(logits, expected, atol=1e-6, rtol=0)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    name = "model.layers.0.self_attn.q_proj.latent_weight"
    assert [rows[name] for _, _, rows in parts] == [22, 22, 20]
    assert not any("codebook" in name for _, _, rows in parts for name in rows)


def test_a_format_of_one_scale_for_all_rows_is_refused():
    """Its scale is the mean of what all processes have."""
    student = tiny_student("llama", "mlp=gguf:i2_s", hidden_size=128)
    with pytest.raises(ValueError, match=r"--shard: .*gguf:i2_s has one scale for all of its rows"):
        split_rows(student)
