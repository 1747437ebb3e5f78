"""Names of the model hub, told from paths: a folder that is missing is never sought there.

`hf:OWNER/NAME` is always a hub's name, `OWNER/NAME` where no folder OWNER is here; `@REVISION`
behind either is a branch, tag or commit.
"""

import re
from pathlib import Path
from typing import NamedTuple

PREFIX = "hf:"
NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
# Folders that this project's commands write to; they may not be there yet.
LOCAL_FOLDERS = ("caches", "data", "exports", "models", "runs")


class HubName(NamedTuple):
    """What is asked of the hub."""

    repository: str
    """OWNER/NAME."""
    revision: str | None
    """Branch, tag or commit; None is the default branch."""


def parse_hub_name(name: str) -> HubName | None:
    """Return the hub's name that a text is, None where it is a path."""
    found = NAME.fullmatch(name.removeprefix(PREFIX))
    if found is None:
        return None
    owner = found["repository"].partition("/")[0]
    if not name.startswith(PREFIX) and (owner in LOCAL_FOLDERS or Path(owner).exists()):
        return None
    return HubName(found["repository"], found["revision"])
