"""Make sure that a Python has qat and what it needs; torch that is there is never touched.

Runs before anything is installed, so it needs the standard library alone. Prints the Python to use.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What a Colab or TPU image pairs by hand: pip must leave it as it is.
PROTECTED = ("torch", "torchvision", "torchaudio", "torch_xla", "torch_tpu", "libtpu", "triton")
PROTECTED += ("numpy", "jax", "jaxlib")
STORE_PACKAGES = {"gs://": "gcsfs", "s3://": "s3fs"}


def installed(name):
    """Return a distribution's version, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def numbers(version):
    """Return a version's numbers, so that two can be compared."""
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]


def is_met(requirement, version_of):
    """Return whether a requirement such as `torch>=2.9` is there and new enough."""
    name, _, least = requirement.partition(">=")
    version = version_of(name)
    return version is not None and (not least or numbers(version) >= numbers(least))


def missing_requirements(version_of=installed, environment=os.environ):
    """Return what qat asks for and what the store in use needs, as far as it is not there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stores = [environment.get("QAT_STORE", ""), "gs://" * bool(environment.get("GCS_BUCKET"))]
    extra = [name for url, name in STORE_PACKAGES.items() for store in stores if url in store]
    required = dict.fromkeys([*project["dependencies"], *extra])
    return [requirement for requirement in required if not is_met(requirement, version_of)]


def is_this_checkout(version_of=installed):
    """Return whether `import qat` gives this checkout from any folder."""
    if version_of("qat") is None:
        return False
    code = "import qat; print(qat.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False
    )
    return found.stdout.strip() == str(ROOT / "qat" / "__init__.py")


def is_tpu_machine():
    """Return whether the system shows a TPU's device files."""
    return Path("/dev/accel0").exists() or any(Path("/dev/vfio").glob("[0-9]*"))


def pip_commands(python, missing, constraints, *, has_torch, has_qat):
    """Return the pip calls: hashed files, then torch; or what lacks next to a torch that stays."""
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not has_torch:
        package = f"{ROOT}[tpu-xla]" if is_tpu_machine() else str(ROOT)
        hashed = ["--require-hashes", "--no-deps", "--requirement", str(ROOT / "requirements.txt")]
        own = ["--constraint", constraints, "--no-build-isolation", "--editable", package]
        return [[*pip, *hashed], [*pip, *own]]
    # A torch that is too old is the user's to replace: the image pairs it with a driver.
    others = [name for name in missing if not name.startswith("torch>=")]
    commands = [[*pip, "--constraint", constraints, *others]] if others else []
    return commands + ([] if has_qat else [[*pip, "--no-deps", "--editable", str(ROOT)]])


def home_python(version_of=installed):
    """Return the Python to install into: this one where it is ours to fill, else one in .venv."""
    is_venv = sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ
    if is_venv or version_of("torch"):
        return sys.executable
    return str(ROOT / ".venv" / "bin" / "python")


def fixed_versions(version_of=installed, *, is_tpu=False):
    """Return the versions that pip must take: those tested, or next to a torch those in place."""
    if version_of("torch"):
        return [f"{name}=={version_of(name)}" for name in PROTECTED if version_of(name)]
    tested = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    # A TPU asks for an older torch.
    return [line for line in tested if not (is_tpu and line.startswith("torch=="))]


def write_constraints():
    """Write the versions that pip must take; return the file."""
    lines = fixed_versions(is_tpu=is_tpu_machine())
    say(f"pip is told to keep {', '.join(lines)}" if installed("torch") else "versions: as tested")
    path = Path(tempfile.gettempdir()) / f"qat-keep-{os.getpid()}.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def say(text):
    """Tell people; standard output is for the Python's path."""
    print(f"[SETUP] {text}", file=sys.stderr, flush=True)


def install(commands, *, dry_run):
    """Run the pip calls, or only show them.

    Raises:
        SystemExit: If one fails.
    """
    for command in commands:
        line = shlex.join(command)
        say(f"would run: {line}" if dry_run else line)
        if not dry_run and subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            raise SystemExit("error: pip failed (its own message is above); fix that and run again")


def main():
    """Install what is missing; print the Python that has it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="only show the pip lines")
    dry_run = parser.parse_args().dry_run
    torch, missing, has_qat = installed("torch"), missing_requirements(), is_this_checkout()
    if not missing and has_qat:
        say(f"{sys.executable} has all that qat needs")
        print(sys.executable)
        return
    python = home_python()
    if python != sys.executable and not Path(python).is_file():
        install([[sys.executable, "-m", "venv", str(ROOT / ".venv")]], dry_run=dry_run)
    if not torch:
        say("torch is not installed: pip gets it")
    constraints = write_constraints()
    commands = pip_commands(python, missing, constraints, has_torch=bool(torch), has_qat=has_qat)
    try:
        install(commands, dry_run=dry_run)
    finally:
        Path(constraints).unlink()
    if torch and not dry_run and torch_of(python) != torch:
        raise SystemExit(f"error: torch was {torch} and is not any more; pip install it again")
    print(sys.executable if dry_run and not Path(python).is_file() else python)


def torch_of(python):
    """Return the version of torch that a Python has now."""
    code = "from importlib.metadata import version; print(version('torch'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.strip()


if __name__ == "__main__":
    main()
