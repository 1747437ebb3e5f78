"""What every test stands on: one seed, one dtype, one thread, no network, no wait for the disk."""

import os
import socket
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of tiny things, threads that wait are most of it
sys.path.insert(0, str(Path(__file__).parent.parent))  # so that tests can say `tests.tiny`

import torch  # noqa: E402 the variables above are read at import

from qat.runtime.device import why_absent  # noqa: E402

if why_absent("cuda"):  # read where triton is first imported, by whatever library
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def same_start():
    """Seed torch and give back its default dtype and thread count after the test."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def disk_that_answers_at_once():
    """Leave out waits that only a power cut needs: 2 to 50 ms each, thousands of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _handle: None)
        yield


@pytest.fixture
def accelerator():
    """The best device that is not the CPU; the test is skipped where there is none."""
    from qat.runtime.device import Device

    device = Device.detect()
    if device.kind == "cpu":
        pytest.skip("no accelerator")
    return device


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuse every connection that leaves this machine."""
    connect = socket.socket.connect

    def refuse(self, address):
        is_local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        if not is_local:
            raise RuntimeError(f"a test reached for the network: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
