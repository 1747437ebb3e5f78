import json
import os
import platform

import pytest

from qat.cli.commands import main
from qat.pipelines import doctor
from qat.runtime import packages


def closing_of(capsys):
    """Return the closing JSON and what was said to people."""
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_it_shows_device_memory_and_versions(capsys):
    """A healthy machine: a device with its memory, and each base package's version."""
    assert main("doctor", ["--device", "cpu"]) == 0
    closing, err = closing_of(capsys)
    assert (closing["device"], closing["kind"]) == ("cpu", "cpu")
    assert closing["memory_bytes"] > 0
    assert closing["versions"]["torch"] in err
    assert "device cpu (asked for)" in err
    assert closing["limits"] == list(packages.LIMITS.get(platform.system(), ()))


def test_a_mismatch_is_shown_with_its_install_line(capsys, monkeypatch):
    """wandb and lz4 absent, as on Colab's TPU image: both named, and the device still shown."""
    installed = packages.installed_version
    monkeypatch.setattr(
        packages,
        "find_mismatches",
        lambda: packages.base_mismatches(
            lambda name: None if name in ("wandb", "lz4") else installed(name)
        ),
    )
    assert main("doctor", []) == 0
    closing, err = closing_of(capsys)
    assert closing["ok"] is False
    assert [entry["install"] for entry in closing["mismatches"]] == [
        "pip install lz4",
        "pip install wandb",
    ]
    assert "mismatch: wandb is not installed; fix: pip install wandb" in err


def test_a_system_on_which_nothing_works_is_asked_for_no_device(capsys, monkeypatch):
    """On Windows the question itself would end in a traceback: it has no sysconf."""
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(doctor, "look_at_device", lambda name: pytest.fail("torch was asked"))
    assert main("doctor", []) == 0
    closing, err = closing_of(capsys)
    assert closing["ok"] is False
    assert "fix: wsl --install" in err


def test_torch_is_not_touched_where_it_is_absent(capsys, monkeypatch):
    """Without torch there is a verdict and no device, not an ImportError."""
    monkeypatch.setattr(packages, "installed_version", lambda name: None)
    monkeypatch.setattr(doctor, "look_at_device", lambda name: pytest.fail("torch was asked"))
    assert main("doctor", []) == 0
    closing, _ = closing_of(capsys)
    assert closing["device"] is None


def test_torch_tpu_without_libtpu_does_not_end_the_process(capsys, monkeypatch):
    """The backend's autoload is turned off before torch is imported."""
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    monkeypatch.setattr(packages, "autoload_aborts", lambda: True)
    assert main("doctor", ["--device", "cpu"]) == 0
    assert os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
