"""The border: what others wrote becomes typed values here, or one line that names file and field.

A file's schema is a dataclass, checked at once by msgspec; nothing behind it looks at types again.
"""

import linecache
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import msgspec

from qat.storage.files import PLAIN_NAME, read_json

MOST = 2**53  # what JSON readers of other languages hold exactly
Count = Annotated[int, msgspec.Meta(ge=0, le=MOST)]
Size = Annotated[int, msgspec.Meta(ge=1, le=MOST)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
# One part of a path: it cannot leave the folder that it is looked up in, nor be hidden there.
FileName = Annotated[str, msgspec.Meta(pattern=rf"\A{PLAIN_NAME.pattern}\Z")]
MISSING = re.compile("Object missing required field `(.*)`")
MOST_LETTERS = 300  # of what a library says
MADE_AGAIN = "fetch or make it again"

Made = TypeVar("Made")


def read_as(
    path: Path, kind: type[Made], *, remedy: str = MADE_AGAIN, refuse: type[ValueError] = ValueError
) -> Made:
    """Return the JSON value in a file as a dataclass, or another type that msgspec knows.

    Raises:
        ValueError: Or `refuse`, if it is no JSON, or not of the type; names file and field.
    """
    return as_type(read_json(path), kind, path, remedy=remedy, refuse=refuse)


def as_type(
    values: object,
    kind: type[Made],
    where: Path | str,
    *,
    remedy: str = MADE_AGAIN,
    refuse: type[ValueError] = ValueError,
) -> Made:
    """Return plain values as a type; fields beyond it are refused as well. Errors: `read_as`."""
    try:
        made = msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$")
        what = MISSING.sub(r"\1 is missing", what)
        field = place.rstrip("`").lstrip(".")
        raise refuse(f"{where}: {field + ': ' if field else ''}{what}; {remedy}") from error
    if unknown := unknown_field(values, kind):
        raise refuse(f"{where}: {unknown} is no field of this version; {remedy}")
    return made


def unknown_field(values: object, kind: object, place: str = "") -> str | None:
    """Return the first field, nested ones joined by dots, that a type does not have."""
    if is_dataclass(kind) and isinstance(values, dict):
        hints = get_type_hints(kind)
        for name, value in values.items():
            if name not in hints:
                return f"{place}{name}"
            if found := unknown_field(value, hints[name], f"{place}{name}."):
                return found
        return None
    items = values if isinstance(values, list) else [values]
    options = [one for one in get_args(kind) if is_dataclass(one) or get_args(one)]
    found = (unknown_field(item, option, place) for option in options for item in items)
    return next(filter(None, found), None)


@contextmanager
def reading(path: Path | str, remedy: str = MADE_AGAIN) -> Iterator[None]:
    """Let what a library raises over a file of others be a ValueError that names the file.

    The one place that catches Exception, around one call of a library each time: tokenizers raises
    nothing more precise, transformers whatever its own lines come upon.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError) or getattr(error, "filename", None):
            raise  # the system's own words on a path
        from qat.runtime.device import says_out_of_memory  # loads torch, which libraries here have
        from qat.runtime.distributed import is_lost_connection

        if is_lost_connection(error):
            raise  # another process's end says nothing of the file
        whole = " ".join(str(error).split())
        if isinstance(error, MemoryError) or says_out_of_memory(whole):
            remedy = "free some memory, the file may be sound: out of memory"
        why = whole.partition(". ")[0][:MOST_LETTERS].rstrip(".") or type(error).__name__
        raise ValueError(f"{path} cannot be read ({why}); {remedy}") from error


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Put a file's name before what is refused inside, unless the message has it."""
    try:
        yield
    except ValueError as error:
        if is_own_mistake(error) or str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def is_own_mistake(error: BaseException) -> bool:
    """Whether a ValueError comes from a line of this package that raises nothing itself.

    `zip(strict=True)`, an unpacking or a conversion that fails there is a fault of the package and
    ends in a traceback. What is raised on purpose, or inside a library, speaks of user input.
    """
    if type(error) is not ValueError or error.__traceback__ is None:
        return False
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    if not frame.f_globals.get("__name__", "").startswith("qat."):
        return False
    return not linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise")


def object_in(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, whatever its fields are."""
    return read_as(path, dict[str, Any])
