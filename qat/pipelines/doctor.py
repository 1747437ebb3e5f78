"""Show the device and what is installed; torch is imported only after the versions are read."""

import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

from qat import __version__
from qat.runtime import packages
from qat.tracking.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """Show device, memory and versions, and the install line for what is missing or misfits."""

    device: str = "auto"
    """auto, cpu, cuda, mps, xla or tpu, with an index where there are several: cuda:1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorResult:
    """What is installed, what does not fit together, and the device."""

    ok: bool
    """Whether nothing is missing and all versions fit together."""
    device: str | None = None
    """As torch names it; None where it is not installed or cannot work, as in the fields below."""
    kind: str | None = None
    """cpu, cuda, mps, xla or tpu."""
    reason: str | None = None
    """Why this device."""
    dtype: str | None = None
    """Default compute dtype on it."""
    memory_bytes: int | None = None
    """Its memory; None where it cannot be known."""
    versions: dict[str, str]
    """Of each package that is installed."""
    mismatches: list[dict[str, str]]
    """What is wrong, and the command that installs what is right."""
    limits: list[str]
    """What does not work on this system, and what to do instead."""


def examine(config: DoctorConfig) -> DoctorResult:
    """Read the versions from metadata, then ask torch about the device."""
    versions = {name: packages.installed_version(name) for name in packages.BASE}
    optional = {name: packages.installed_version(name) for name in packages.OPTIONAL}
    fatal = packages.system_mismatches(platform.system(), platform.machine())
    mismatches = [*fatal, *packages.find_mismatches()]
    limits = packages.LIMITS.get(platform.system(), ())
    say(f"qat {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name, version in {**versions, **optional}.items():
        say(f"  {name:<20}{version or ('absent' if name in versions else '-')}")
    for mismatch in mismatches:
        say(f"mismatch: {mismatch.what}; fix: {mismatch.install}")
    for limit in limits:
        say(f"limit: {limit}")
    device = look_at_device(config.device) if versions["torch"] and not fatal else {}
    return DoctorResult(
        ok=not mismatches,
        versions={name: version for name, version in (versions | optional).items() if version},
        mismatches=[asdict(mismatch) for mismatch in mismatches],
        limits=list(limits),
        **device,
    )


def look_at_device(name: str) -> dict[str, Any]:
    """Return what torch says of a device."""
    if packages.autoload_aborts():
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    from qat.runtime.device import Device, dtype_name  # torch may be absent, or abort at import

    device = Device.detect(name)
    say(device.describe())
    return {
        "device": str(device.torch_device),
        "kind": device.kind,
        "reason": device.reason,
        "dtype": dtype_name(device.dtype),
        "memory_bytes": device.total_bytes(),
    }
