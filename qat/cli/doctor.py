"""`qat doctor`: the device, what is installed, and what to install where something misfits."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qat import __version__
from qat.cli.command import run_command
from qat.runtime import packages
from qat.tracking.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """Show device, memory and versions, and the install line for what is missing or misfits."""

    device: str = "auto"
    """auto, cpu, cuda, mps, xla or tpu, with an index where there are several: cuda:1."""


def examine(config: DoctorConfig) -> dict[str, Any]:
    """Judge by metadata first; import torch only after that."""
    versions = {name: packages.installed_version(name) for name in packages.BASE}
    optional = {name: packages.installed_version(name) for name in packages.OPTIONAL}
    mismatches = packages.find_mismatches()
    say(f"qat {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name, version in {**versions, **optional}.items():
        say(f"  {name:<20}{version or ('absent' if name in versions else '-')}")
    for mismatch in mismatches:
        say(f"misfit: {mismatch.what}; mend it with: {mismatch.install}")
    device = look_at_device(config.device) if versions["torch"] else {}
    return {
        "ok": not mismatches,
        "device": None,
        **device,
        "versions": {name: version for name, version in (versions | optional).items() if version},
        "mismatches": [asdict(mismatch) for mismatch in mismatches],
    }


def look_at_device(name: str) -> dict[str, Any]:
    """Return what torch says of a device."""
    if packages.autoload_aborts():
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    from qat.runtime.device import Device, dtype_name

    device = Device.detect(name)
    say(device.describe())
    return {
        "device": str(device.torch_device),
        "kind": device.kind,
        "reason": device.reason,
        "dtype": dtype_name(device.dtype),
        "memory_bytes": device.total_bytes(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat doctor", DoctorConfig, examine, argv)
