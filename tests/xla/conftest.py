"""What the tier stands on: torch_xla, which runs on the CPU here."""

import importlib.util
import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def on_the_cpu():
    """Run XLA on the CPU; leave the tier out where there is no XLA."""
    if importlib.util.find_spec("torch_xla") is None:
        pytest.skip("torch_xla is not installed; `make xla` runs these tests")
    os.environ["PJRT_DEVICE"] = "CPU"
