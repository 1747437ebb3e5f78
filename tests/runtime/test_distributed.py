import json

import pytest
import torch

from qat.runtime import distributed
from qat.runtime.device import Device
from qat.runtime.launch import rank
from tests.processes import forked

CPU = Device.detect("cpu")


def talk():
    """Return what a process learns of the others."""
    with distributed.joined(CPU):
        parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
        for parameter in parameters[1:]:
            parameter.grad = torch.full((2,), float(rank() + 1))
        distributed.sum_gradients(parameters)
        return {
            "total": distributed.total(torch.tensor(float(rank() + 1))).item(),
            "gradients": [p.grad if p.grad is None else p.grad.tolist() for p in parameters],
            "from_first": distributed.from_first(lambda: f"made by {rank()}"),
            "gathered": distributed.gathered(rank() * 10),
            "share": list(distributed.share(range(8))),
        }


@pytest.mark.recipe
def test_processes_tell_each_other():
    """Sums and lists are the same in all; shares are disjoint and leave nothing out."""
    told = forked(3, talk)
    shares = [one.pop("share") for one in told]
    assert sorted(sum(shares, [])) == list(range(8))
    expected = {
        "total": 6.0,
        "gradients": [None, [6.0, 6.0], [6.0, 6.0]],
        "from_first": "made by 0",
        "gathered": [0, 10, 20],
    }
    assert told == [expected] * 3


def test_one_process_is_left_as_it_is():
    """No process group is made, and everything is its own."""
    assert talk() == {
        "total": 1.0,
        "gradients": [None, [1.0, 1.0], [1.0, 1.0]],
        "from_first": "made by 0",
        "gathered": [0],
        "share": list(range(8)),
    }


def test_saved_tensors_are_found_by_a_plain_index(tmp_path):
    """It goes through JSON, and no pickle stays in the folder."""
    saved = {"a.b": torch.arange(6.0).view(2, 3), "step": torch.tensor(3), "none": torch.ones(0, 2)}
    stager = distributed.open_stager(torch.device("cpu"))
    for done in distributed.start_saving(saved, tmp_path, stager):
        done.result()
    index = json.loads(json.dumps(distributed.take_index(tmp_path)))
    assert [path.suffix for path in tmp_path.iterdir()] == [".distcp"]
    sizes = distributed.saved_sizes(index)
    assert sizes == {name: (tensor.shape, tensor.dtype) for name, tensor in saved.items()}
    read = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in sizes.items()}
    distributed.load_saved(read, tmp_path, index)
    assert all(torch.equal(read[name], saved[name]) for name in saved)


def test_tensors_are_copied_into_the_same_memory_again():
    """A save touches no fresh memory after the first; the copy is of the moment."""
    stager, tensor = distributed.open_stager(torch.device("cpu")), torch.arange(6.0)
    first = stager.stage({"a": tensor}).result()["a"]
    tensor += 1
    assert first.tolist() == list(range(6))
    again = stager.stage({"a": tensor}).result()["a"]
    assert again.data_ptr() == first.data_ptr() != tensor.data_ptr()
    assert torch.equal(again, tensor)


def test_an_error_of_gloo_tells_of_a_lost_process():
    """Others are what they are."""
    assert distributed.is_lost_connection(RuntimeError("[..]/third_party/gloo/gloo/pair.cc: reset"))
    assert not distributed.is_lost_connection(RuntimeError("shapes do not match"))
