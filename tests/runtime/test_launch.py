import pytest

from qat.runtime import launch
from tests.processes import environment_of


def test_without_torchrun_there_is_one_process(monkeypatch):
    """Also where a cluster sets a part of its variables."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (launch.rank(), launch.local_rank(), launch.num_processes()) == (0, 0, 1)
    assert launch.is_first()


@pytest.mark.parametrize("rank", [0, 2])
def test_a_process_of_torchrun_knows_its_rank(monkeypatch, rank):
    """The first one speaks for all."""
    for name, value in environment_of(rank, 4, 29500).items():
        monkeypatch.setenv(name, value)
    assert (launch.rank(), launch.local_rank(), launch.num_processes()) == (rank, rank, 4)
    assert launch.is_first() == (rank == 0)
