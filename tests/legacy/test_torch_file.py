"""A file written tensor by tensor is the file that torch writes."""

import resource
import weakref
import zipfile

import pytest
import torch

from qat.legacy.torch_file import write_torch_file

TENSORS = {
    "matrix": torch.randn(3, 4),
    "indices": torch.arange(6).view(2, 3),
    "flag": torch.tensor(1, dtype=torch.int8),
    "columns of a larger one": torch.randn(4, 6)[:, ::2],
    "rows of a larger one": torch.randn(10)[2:5],
    "empty": torch.empty(0, 3),
}


@pytest.mark.parametrize("mmap", [False, True])
def test_what_is_written_is_read(tmp_path, mmap):
    """Names in order, dtypes, shapes and bits; an alias shares its memory; checksums hold."""
    file = tmp_path / "state.pt"
    write_torch_file(file, [*TENSORS.items(), ("alias", "matrix")])
    stored = torch.load(file, weights_only=True, mmap=mmap)
    assert list(stored) == [*TENSORS, "alias"]
    for name, tensor in TENSORS.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor)
    assert stored["alias"].data_ptr() == stored["matrix"].data_ptr()
    with zipfile.ZipFile(file) as members:
        assert members.testzip() is None


def test_one_tensor_at_a_time(tmp_path):
    """When a tensor is asked for, no more than the one before it is still held."""
    given = []

    def tensors():
        for index in range(5):
            assert sum(reference() is not None for reference in given) <= 1
            tensor = torch.full((100,), float(index))
            given.append(weakref.ref(tensor))
            yield str(index), tensor
            del tensor

    write_torch_file(tmp_path / "state.pt", tensors())
    assert len(given) == 5
    assert torch.load(tmp_path / "state.pt", weights_only=True)["3"][0] == 3


def test_a_full_disk_ends_in_one_line(tmp_path):
    """torch reports a failed write as RuntimeError, which ended in a traceback."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"has no space for a \.pt file .* free some space"):
            write_torch_file(tmp_path / "state.pt", {"a": torch.zeros(5000)}.items())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
