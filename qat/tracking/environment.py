"""Where a run ran: device, machine, versions, commit and command, one entry a session."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

from qat import __version__
from qat.storage.decode import read_as
from qat.storage.files import read_json, write_json

ENVIRONMENT = "environment.json"
VERSIONS = ("torch", "torch_xla", "torch_tpu", "transformers")
GIT_SECONDS = 10  # a checkout on a mounted drive may answer slowly


class Session(TypedDict):
    """What is read of a session, which holds more."""

    device: str
    machine: str
    started: str
    commit: str | None


def describe_environment(device_name: str = "auto") -> dict[str, Any]:
    """Return the machine and the call; `device_name` is as the run's flag has it."""
    from qat.runtime.device import Device
    from qat.runtime.packages import installed_version

    versions = {name: installed_version(name) for name in VERSIONS}
    return {
        "device": Device.detect(device_name).describe(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {"qat": __version__, **{k: v for k, v in versions.items() if v}},
        "commit": commit_of(Path(__file__).parent),
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit_of(folder: Path) -> str | None:
    """Return the commit of a checkout, marked where files differ; None where there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty=+changes"],
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def add_session(folder: Path, environment: dict[str, Any], *, is_resumed: bool) -> None:
    """Write a session into a run's folder: after the previous ones where it resumes them."""
    previous = read_sessions(folder) if is_resumed else []
    write_json(Path(folder) / ENVIRONMENT, [*previous, environment])


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """Return a run's sessions in order; none where it did not keep them."""
    path = Path(folder) / ENVIRONMENT
    if not path.is_file():
        return []
    read_as(path, list[Session])
    return read_json(path)
