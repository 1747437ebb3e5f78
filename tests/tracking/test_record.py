import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch

from qat.storage.files import write_json
from qat.tracking.record import (
    CONFIG,
    METRICS,
    SETTINGS,
    RunRecord,
    config_as_json,
    config_from_json,
    read_config,
    read_rows,
    read_summary,
)


def test_rows_come_back_in_order(tmp_path):
    """What is logged is read back, each row with its step."""
    record = RunRecord(tmp_path / "run")
    record.log(0, {"eval/kl_nats": 2.5})
    record.log(1, {"train/loss": torch.tensor(0.5), "train/tokens_seen": 64})
    assert read_rows(tmp_path / "run") == [
        {"step": 0, "eval/kl_nats": 2.5},
        {"step": 1, "train/loss": 0.5, "train/tokens_seen": 64},
    ]


def test_resume_drops_the_rows_that_will_be_written_again(tmp_path):
    """Opened at step 2, a record holds steps up to 2; opened anew, none."""
    record = RunRecord(tmp_path)
    for step in range(5):
        record.log(step, {"train/loss": 1.0})
    RunRecord(tmp_path, resume_step=2)
    assert [row["step"] for row in read_rows(tmp_path)] == [0, 1, 2]
    RunRecord(tmp_path)
    assert read_rows(tmp_path) == []


def test_a_number_that_is_not_finite_is_null(tmp_path):
    """The file stays JSON when a loss is NaN."""
    RunRecord(tmp_path).log(3, {"train/loss": float("nan"), "train/grad_norm": float("inf")})
    assert read_rows(tmp_path) == [{"step": 3, "train/loss": None, "train/grad_norm": None}]


def test_a_half_written_last_line_is_left_out(tmp_path):
    """A killed process costs one row, and the resumed run writes on a whole line."""
    record = RunRecord(tmp_path)
    record.log(1, {"train/loss": 1.0})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 2, "train/lo')
    assert [row["step"] for row in read_rows(tmp_path)] == [1]
    RunRecord(tmp_path, resume_step=1).log(2, {"train/loss": 0.5})
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS).open()] == [1, 2]


def test_a_broken_line_in_the_middle_is_refused(tmp_path):
    """A damaged file is not read as a shorter one; the message names the line."""
    (tmp_path / METRICS).write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 "):
        read_rows(tmp_path)


def test_config_and_summary_come_back_and_may_be_absent(tmp_path):
    """A run that has not ended has no summary; that is no error."""
    record = RunRecord(tmp_path)
    assert (read_config(tmp_path), read_summary(tmp_path)) == ({}, {})
    record.write_config({"lr": 1e-4})
    record.finish({"best_kl_nats": 0.5})
    assert (read_config(tmp_path), read_summary(tmp_path)) == ({"lr": 1e-4}, {"best_kl_nats": 0.5})


@dataclass(frozen=True)
class Part:
    """Nested settings."""

    rate: float = 1.0
    mode: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Settings:
    """A command's settings."""

    folder: Path
    names: tuple[str, ...] = ()
    count: int | None = None
    is_on: bool = False
    part: Part = field(default_factory=Part)


def test_a_config_is_the_same_after_json(tmp_path):
    """Paths, tuples, nested parts, None; a whole number where a float goes."""
    config = Settings(Path("x/y"), ("a", "b"), 3, True, Part(2.0, "b"))
    write_json(tmp_path / CONFIG, {SETTINGS: config_as_json(config)})
    assert config_from_json(Settings, read_config(tmp_path)[SETTINGS]) == config
    rate = config_from_json(Settings, {"folder": "x", "part": {"rate": 2}}).part.rate
    assert (rate, type(rate)) == (2.0, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"folder": "x", "width": 1}, "width is not one of folder, names"),
        ({"folder": "x", "part": {"speed": 1}}, "part.speed is not one of rate, mode"),
        ({}, "folder is missing"),
        ([], "config .* is not a JSON object"),
        ({"folder": "x", "part": 3}, "part 3 is not a JSON object"),
        ({"folder": 3}, "folder 3 is not of type str"),
        ({"folder": "x", "names": "ab"}, "names 'ab' is not of type"),
        ({"folder": "x", "names": [1]}, "names 1 is not of type str"),
        ({"folder": "x", "count": True}, "count True is not of type int"),
        ({"folder": "x", "is_on": 1}, "is_on 1 is not of type bool"),
        ({"folder": "x", "part": {"mode": "c"}}, r"part.mode 'c' is not of type a \| b"),
        ({"folder": "x", "part": {"rate": "1"}}, "part.rate '1' is not of type float"),
    ],
)
def test_what_a_config_does_not_hold_is_refused(values, message):
    """With the key and what it takes."""
    with pytest.raises(ValueError, match=message):
        config_from_json(Settings, values)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"step": 1, "train/loss": NaN}', "NaN is no number"),
        (b'{"step": 1, "train/loss": "low"}', "train/loss|Expected"),
        (b'{"step": -1}', "step"),
        (b'{"loss": 1}', "step.* is missing"),
        (b"[1]", "Expected .object"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 5000, "nested too deeply"),
    ],
)
def test_a_row_that_is_none_is_named_with_its_line(tmp_path, line, said):
    """Whatever stands there; it reached sorting and plotting as it was."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=rf"metrics\.jsonl:2.*({said}).*remove that line"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("name", "read", "values"),
    [
        ("config.json", read_config, {"identity": []}),
        ("config.json", read_config, {"identity": {"settings": []}}),
        ("config.json", read_config, {"config": 3}),
        ("config.json", read_config, []),
        ("summary.json", read_summary, {"steps": "4"}),
        ("summary.json", read_summary, {"best_kl_nats": [1]}),
        ("summary.json", read_summary, 3),
    ],
)
def test_a_record_of_another_form_is_named(tmp_path, name, read, values):
    """What others read of it is of the type that they reckon with."""
    write_json(tmp_path / name, values)
    with pytest.raises(ValueError, match=rf"{name}: .*Expected .*again"):
        read(tmp_path)
