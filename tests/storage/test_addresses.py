from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qat.storage.addresses import TAKES_ADDRESS, as_address, require_paths, working_folder


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("s3://bucket/run/", "s3://bucket/run"),
        ("gs://bucket/a/b", "gs://bucket/a/b"),
        ("hf://buckets/owner/name", "hf://buckets/owner/name"),
        ("memory://x/y", "memory:///x/y"),
        ("file:///tmp/x", "file:///tmp/x"),
        ("runs/s3", None),
        ("/tmp/a:b/c", None),
        ("hf:owner/name", None),
        ("C:/runs", None),
    ],
)
def test_an_address_is_told_from_a_path(given, address):
    """Also where a setting holds it as a path, which has taken one of its slashes."""
    assert as_address(given) == address
    assert as_address(Path(given)) == address


def test_every_address_has_a_folder_of_its_own():
    """Runs of one name in two buckets do not meet here."""
    folders = {working_folder(f"s3://{name}/run", "runs") for name in ("a", "b")}
    assert len(folders) == 2
    assert {folder.name[:4] for folder in folders} == {"run-"}
    assert working_folder("s3://a/..", "runs").parent == Path("runs")


@dataclass
class Inner:
    copy_to: Path | None = None


@dataclass
class Outer:
    output: Path = field(metadata=TAKES_ADDRESS)
    inputs: tuple[Path, ...] = ()
    inner: Inner = field(default_factory=Inner)


def test_an_address_is_refused_where_a_path_goes():
    """The flag, the address as it was typed and a remedy are named."""
    address = Path("s3://bucket/x")
    require_paths(Outer(output=address, inputs=(Path("x"),)))
    with pytest.raises(ValueError, match="--inputs s3://bucket/x is an address.*qat fetch"):
        require_paths(Outer(output=address, inputs=(Path("x"), address)))
    with pytest.raises(ValueError, match="--inner.copy-to s3://bucket/x"):
        require_paths(Outer(output=address, inner=Inner(address)))
