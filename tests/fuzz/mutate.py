"""Damage to files, from a seed: to bytes, and to what the bytes of known forms stand for.

A mutator takes bytes and a generator and returns other bytes. Those of a known form keep the form
whole, so that a reader gets past its first check.
"""

import gzip
import io
import json
import math
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import lz4.frame
import torch

Mutator = Callable[[bytes, Random], bytes]
WORDS = (
    "",
    " ",
    "../../escaped",
    "/tmp/escaped",
    "a/../../b",
    "NaN",
    "\u0000",
    "\ud7ff",
    "x" * 300,
)
NUMBERS = (0, 1, -1, 2, 255, 256, 65536, 2**31, -(2**31), 2**63, 2**64, 10**30, 0.5, -0.5, 1e308)
ODD = (None, True, False, [], {}, [[]], {"a": 1}, math.nan, math.inf, -math.inf, *WORDS, *NUMBERS)


def any_bytes(data: bytes, rng: Random) -> bytes:
    """Change, cut, lengthen, repeat or remove bytes."""
    place, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 64, 1000))
    kind = rng.randrange(8)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + rng.randbytes(size) + data[place:]
    if kind == 2:
        return data[:place] + data[place + size :]
    if kind == 3:
        return data[:place] + data[place : place + size] * 2 + data[place + size :]
    if kind == 4:
        return rng.choice((b"", b"\0", b"null", b"[]", b"{}", b"[" * 20_000, b"9" * 5000))
    if kind == 5:
        return data[:place] + b"\0" * size + data[place + size :]
    if kind == 6:
        return data[:place] + rng.choice((b"\xff", b"\x7f", b"\x80")) * 4 + data[place + 4 :]
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 3, 20))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def any_json(data: bytes, rng: Random) -> bytes:
    """Change, remove or add one value of a JSON text."""
    value = json.loads(data)
    places = list(json_places(value))
    if not places or rng.random() < 0.03:
        return json.dumps(rng.choice(ODD)).encode()
    # Every key of a level is as likely, however many values lie below the others.
    depth = rng.choice(sorted({len(place) for place in places}))
    *way, key = rng.choice([place for place in places if len(place) == depth])
    owner = value
    for step in way:
        owner = owner[step]
    kind = rng.randrange(6)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[rng.choice(("unknown", "", "../x"))] = rng.choice(ODD)
    elif kind == 2 and isinstance(owner[key], list | dict | str) and owner[key]:
        owner[key] = owner[key] * 2 if not isinstance(owner[key], dict) else [owner[key]]
    elif kind == 3:
        owner[key] = [owner[key]]
    elif kind == 4 and isinstance(owner[key], int | float):
        owner[key] = owner[key] * rng.choice((-1, 2, 1000, 0.5)) + rng.choice((0, 1))
    else:
        owner[key] = rng.choice(ODD)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def json_places(value: object, way: tuple = ()) -> object:
    """Yield the way to each value inside a value."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for number, (key, inner) in enumerate(items):
        if number < 200:  # of a vocabulary the first ones are enough
            yield (*way, key)
            yield from json_places(inner, (*way, key))


def any_line(data: bytes, rng: Random) -> bytes:
    """Change one JSON line of several."""
    lines = data.splitlines(keepends=True)
    if not lines:
        return any_bytes(data, rng)
    place = rng.randrange(len(lines))
    if rng.random() < 0.2:
        lines[place] = any_bytes(lines[place], rng)
    else:
        lines[place] = any_json(lines[place], rng) + b"\n"
    return b"".join(lines)


def any_text(data: bytes, rng: Random) -> bytes:
    """Change a template or a TOML file: a line goes, is doubled, or a piece is put in."""
    lines = data.splitlines(keepends=True)
    pieces = (b"{{ ", b"{% for x in y %}", b"{% endif %}", b"[[", b"= ", b'"', b"{{ 9**9**9 }}")
    pieces += (b"{{ ''.__class__.__mro__ }}", b"{% include '/etc/passwd' %}", b"\n", b"'../../x'")
    pieces += (b"{{ raise_exception('no') }}", b"{{ messages[7].content }}", b"kind = 3\n")
    place = rng.randrange(len(data) + 1)
    kind = rng.randrange(3)
    if kind == 0 and lines:
        del lines[rng.randrange(len(lines))]
        return b"".join(lines)
    if kind == 1:
        return data[:place] + rng.choice(pieces) + data[place:]
    return any_bytes(data, rng)


def any_tensor(tensor: torch.Tensor, rng: Random) -> torch.Tensor:
    """Change a tensor's values, dtype or shape."""
    dtypes = (torch.float64, torch.int64, torch.int8, torch.float16, torch.bool)
    changes: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
        lambda one: one.to(rng.choice(dtypes)),
        lambda one: one.flatten(),
        lambda one: one[:-1] if one.dim() else one.view(1),
        lambda one: torch.cat([one, one]) if one.dim() else one.expand(2),
        lambda one: one.unsqueeze(0),
        lambda one: torch.zeros(0, dtype=one.dtype),
        torch.zeros_like,
        *[lambda one: any_value(one, rng)] * 3,
    )
    return rng.choice(changes)(tensor)


def any_value(tensor: torch.Tensor, rng: Random) -> torch.Tensor:
    """Change one number of a tensor to one that is odd for its dtype."""
    flat = tensor.clone().flatten()
    if not len(flat):
        return tensor
    if tensor.dtype == torch.bool:
        odd = (True, False)
    elif tensor.is_floating_point():
        odd = (math.nan, math.inf, -math.inf, torch.finfo(tensor.dtype).max, -300.0)
    else:
        limits = torch.iinfo(tensor.dtype)
        odd = (limits.min, limits.max, max(-1, limits.min), min(300, limits.max))
    flat[rng.randrange(len(flat))] = rng.choice(odd)
    return flat.view(tensor.shape)


def any_named(tensors: dict, rng: Random) -> dict:
    """Change, remove, rename or add one of several named tensors."""
    if not tensors:
        return {"unknown.weight": torch.zeros(2)}
    name, kind = rng.choice(sorted(map(str, tensors))), rng.randrange(8)
    tensors = dict(tensors)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name + rng.choice((".x", ".indices", ""))] = tensors.pop(name)
    elif kind == 2:
        tensors["unknown.weight"] = torch.zeros(2)
    elif isinstance(tensors.get(name), torch.Tensor):
        tensors[name] = any_tensor(tensors[name], rng)
    return tensors


def any_safetensors(data: bytes, rng: Random) -> bytes:
    """Change a tensor of a safetensors file, or its header."""
    from safetensors.torch import load, save

    if rng.random() < 0.3:
        (size,) = struct.unpack("<Q", data[:8])
        header = any_json(data[8 : 8 + size], rng)
        return struct.pack("<Q", len(header)) + header + data[8 + size :]
    made = {k: v.clone().contiguous() for k, v in any_named(load(data), rng).items()}
    return save(made)


def any_torch(data: bytes, rng: Random) -> bytes:
    """Change what a torch file holds."""
    stored = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if rng.random() < 0.1:
        stored = rng.choice(([], {}, torch.zeros(3), "text", 3, {"a": 1}, {3: torch.zeros(1)}))
    else:
        stored = any_nested(stored, rng)
    made = io.BytesIO()
    torch.save(stored, made)
    return made.getvalue()


def any_nested(value: object, rng: Random) -> object:
    """Change something inside nested dicts and lists of tensors."""
    if isinstance(value, torch.Tensor):
        return any_tensor(value, rng)
    if isinstance(value, dict) and value:
        inner = [k for k, v in value.items() if isinstance(v, dict | list) and v]
        if inner and rng.random() < 0.8:
            key = rng.choice(inner)
            return {**value, key: any_nested(value[key], rng)}
        if all(isinstance(key, str) for key in value) and rng.random() < 0.8:
            return any_named(value, rng)
        key = rng.choice(list(value))
        return {**value, key: rng.choice(ODD)}
    if isinstance(value, list) and value:
        place = rng.randrange(len(value))
        return [*value[:place], any_nested(value[place], rng), *value[place + 1 :]]
    return rng.choice(ODD)


def any_archive(data: bytes, rng: Random) -> bytes:
    """Change a tar inside its compression: bytes of it, or a member of it."""
    is_lz4 = data[:4] == b"\x04\x22\x4d\x18"
    raw = lz4.frame.decompress(data) if is_lz4 else gzip.decompress(data)
    if rng.random() < 0.4:
        raw = any_bytes(raw, rng)
    else:
        made = io.BytesIO()
        with (
            tarfile.open(fileobj=io.BytesIO(raw)) as old,
            tarfile.open(fileobj=made, mode="w") as new,
        ):
            members = old.getmembers()
            chosen = rng.randrange(len(members))
            for number, member in enumerate(members):
                content = old.extractfile(member) if member.isfile() else None
                if number == chosen:
                    change_member(member, rng)
                    if not member.isfile():
                        content = None
                new.addfile(member, content)
        raw = made.getvalue()
    return lz4.frame.compress(raw, content_checksum=True) if is_lz4 else gzip.compress(raw)


def change_member(member: tarfile.TarInfo, rng: Random) -> None:
    """Give a member another name or kind."""
    kind = rng.randrange(4)
    if kind == 0:
        member.name = rng.choice(
            ("../escaped", "/tmp/escaped", "a/../../escaped", ".", "x" * 400, "")
        )
    elif kind == 1:
        member.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE))
        member.linkname = rng.choice(("/etc/passwd", "../../escaped", member.name, "absent"))
        member.size = 0
    elif kind == 2:
        member.type = rng.choice((tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE))
        member.size = 0
    else:
        member.mode = rng.choice((0, 0o4777, 0o777))


def any_parquet(data: bytes, rng: Random) -> bytes:
    """Change a column of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(io.BytesIO(data))
    name, kind = rng.choice(table.column_names), rng.randrange(4)
    odd = rng.choice((None, 3, 0.5, b"\xff\xfe", ["a"], {"a": 1}, "", "\x00" * 9, 10**12))
    if kind == 0:
        table = table.drop_columns([name])
    elif kind == 1:
        table = table.rename_columns([rng.choice(("text", "messages", "x")) for _ in table.columns])
    else:
        column = pyarrow.array([odd] * len(table))
        table = table.set_column(table.column_names.index(name), name, column)
    made = io.BytesIO()
    pyarrow.parquet.write_table(table, made)
    return made.getvalue()


def any_gguf(data: bytes, rng: Random) -> bytes:
    """Change a number near a word of a GGUF header, or bytes of its data."""
    words = [b"general.", b"llama.", b"tokenizer.", b"blk.", b"token_embd", b"output", b"GGUF"]
    places = [place for word in words if (place := data.find(word)) >= 0]
    places += [found.end() for found in re.finditer(rb"tokenizer\.ggml\.\w+", data)]
    if not places or rng.random() < 0.3:
        return any_bytes(data, rng)
    place = max(0, rng.choice(places) + rng.randrange(-16, 80))
    number = rng.choice((0, 1, 3, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1, 300, 12345))
    packed = struct.pack("<Q", number)[: rng.choice((1, 4, 8))]
    return data[:place] + packed + data[place + len(packed) :]


BY_SUFFIX: dict[str, Mutator] = {
    ".json": any_json,
    ".jsonl": any_line,
    ".safetensors": any_safetensors,
    ".pt": any_torch,
    ".lz4": any_archive,
    ".tgz": any_archive,
    ".parquet": any_parquet,
    ".gguf": any_gguf,
    ".toml": any_text,
    ".jinja": any_text,
}


def mutate(path: Path, rng: Random) -> str:
    """Change a file, or let it be absent or a folder; return what was done."""
    kind = rng.random()
    if kind < 0.02:
        path.unlink()
        return "removed"
    if kind < 0.03:
        path.unlink()
        path.mkdir()
        return "made a folder"
    data = path.read_bytes()
    mutator = BY_SUFFIX.get(path.suffix, any_bytes) if rng.random() < 0.7 else any_bytes
    path.write_bytes(mutator(data, rng))
    return mutator.__name__
