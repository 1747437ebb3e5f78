import tomllib
from pathlib import Path

import pytest

from qat.runtime import packages

BASE = dict.fromkeys(packages.BASE, "1.0") | {"torch": "2.13.0+cpu"}


def misfits(**changes):
    """Return what is said of the base with some versions changed; None removes one."""
    versions = BASE | {name.replace("-", "_"): version for name, version in changes.items()}
    return packages.find_mismatches(versions.get)


@pytest.mark.parametrize(
    ("system", "machine", "install"),
    [
        ("Linux", "x86_64", None),
        ("Darwin", "arm64", None),
        ("Darwin", "x86_64", "use a Mac with Apple silicon, or Linux"),
        ("Windows", "AMD64", "wsl --install"),
    ],
)
def test_a_system_on_which_nothing_works_is_named(system, machine, install):
    """With what to do instead."""
    found = [mismatch.install for mismatch in packages.system_mismatches(system, machine)]
    assert found == ([install] if install else [])


def test_a_whole_base_has_no_mismatch():
    """The versions that the project asks for raise nothing."""
    assert misfits() == []


@pytest.mark.parametrize(
    ("changes", "what", "install"),
    [
        ({"wandb": None}, "wandb is not installed", "pip install wandb"),
        ({"lz4": None}, "lz4 is not installed", "pip install lz4"),
        ({"torch": "2.6.0"}, "torch 2.6.0 is older than 2.9", "pip install 'torch>=2.9'"),
        (
            {"torch_xla": "2.9.0", "libtpu": "0.0.21"},
            "torch 2.13.0+cpu does not fit torch_xla 2.9.0",
            "pip install torch==2.9.0 'torch_xla[tpu]==2.9.0'",
        ),
        (
            {"torch": "2.9.0+cpu", "torch_xla": "2.9.0"},
            "torch_xla without libtpu sees no TPU",
            "pip install torch==2.9.0 'torch_xla[tpu]==2.9.0'",
        ),
        (
            {"torch_tpu": "0.2.0"},
            "torch_tpu without libtpu ends the process",
            "pip install libtpu",
        ),
        (
            {"torch": "2.16.0", "torch_tpu": "0.2.0", "libtpu": "0.0.50"},
            "torch 2.16.0 does not fit torch_tpu 0.2.0",
            "pip install 'torch>=2.11,<2.16' 'torch_tpu>=0.2' libtpu",
        ),
    ],
)
def test_each_mismatch_is_named_with_its_install_line(changes, what, install, monkeypatch):
    """One thing wrong gives one finding and one line that fixes it."""
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    assert misfits(**changes) == [packages.Mismatch(what, install)]


def test_xla_on_the_cpu_needs_no_libtpu(monkeypatch):
    """PJRT_DEVICE=CPU uses the client inside the torch_xla wheel."""
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    assert misfits(torch="2.9.0", torch_xla="2.9.0") == []


def test_the_two_tpu_back_ends_exclude_each_other():
    """They need different releases of torch, so both together is said first."""
    found = misfits(torch="2.9.0", torch_xla="2.9.0", torch_tpu="0.2.0", libtpu="0.0.50")
    assert "exclude each other" in found[0].what


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.9.0+cpu", (2, 9)), ("2.16rc1", (2, 16)), ("2.11.0a0+git12", (2, 11))],
)
def test_a_release_is_its_first_two_numbers(version, expected):
    """Local labels and pre-releases do not change the pair."""
    assert packages.release(version) == expected


def test_the_base_is_what_pyproject_declares():
    """The doctor looks for exactly the dependencies that an installer would bring."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    declared = tomllib.loads(text)["project"]["dependencies"]
    assert sorted(packages.BASE) == sorted(line.split(">")[0] for line in declared)
