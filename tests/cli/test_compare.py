import json
from types import SimpleNamespace

import pytest

from qat.cli.commands import main
from qat.tracking import sinks
from qat.tracking.record import RunRecord

pytestmark = pytest.mark.recipe


def test_the_closing_line_holds_numbers_and_paths(tmp_path, capsys):
    """`qat compare` ends with one JSON line; its table goes to standard error."""
    RunRecord(tmp_path / "run").log(1, {"train/loss": 0.5})
    code = main("compare", [str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    closing = json.loads(out)
    assert code == 0
    assert closing["runs"] == [{"run": "run", "steps": 1, "final_loss": 0.5}]
    assert closing["plot"] == str(tmp_path / "out" / "compare.png")
    assert "| run | 1 | 0.5 |" in err


def test_the_comparison_goes_to_wandb_when_asked(tmp_path, capsys, monkeypatch):
    """An offline run holds the table and the page."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    RunRecord(tmp_path / "run").log(1, {"train/loss": 0.5})
    arguments = [str(tmp_path / "run"), "--output", str(tmp_path / "out")]
    assert main("compare", [*arguments, "--wandb-project", "tests"]) == 0
    json.loads(capsys.readouterr().out)
    media = [path.name for path in tmp_path.glob("out/wandb/offline-run-*/files/media/**/*")]
    assert any(name.endswith(".table.json") for name in media)
    assert any(name.endswith(".html") for name in media)


class FakeProject:
    """W&B's server: keeps what sinks send and gives it as its API does."""

    def __init__(self):
        self.started = []

    def init(self, *, config, name, group, job_type="train", **_):
        run = SimpleNamespace(
            config=config, name=name, group=group, job_type=job_type, summary={}, history={}
        )
        run.define_metric = lambda *_, **__: None
        run.finish = lambda: None

        def log(values, step):
            row = run.history.setdefault(step, {"_step": step, "_timestamp": 1.0})
            row.update(values)
            run.summary.update(row)

        run.log = log
        run.scan_history = lambda: iter(run.history.values())
        self.started.append(run)
        return run

    def runs(self, project, *, filters, order):
        assert (project, order) == ("p", "+created_at")
        return [run for run in self.started if filters.get("group") in (None, run.group)]


@pytest.fixture
def project(monkeypatch):
    import wandb

    fake = FakeProject()
    monkeypatch.setattr(sinks, "start_wandb", lambda **settings: fake.init(**settings))
    monkeypatch.setattr(wandb, "Api", lambda: fake)
    return fake


def test_a_project_gives_the_table_that_its_folders_give(tmp_path, capsys, project):
    """The same runs, read at W&B and on disk: one markdown page, to the letter."""
    folders = []
    for number, lr in enumerate((0.1, 0.2)):
        folder = tmp_path / f"run{number}"
        group = "other" if number else "speedrun"
        options = {"project": "p", "group": group}
        track = sinks.open_tracker(folder, {"lr": lr, "parts": {"a": 1}}, wandb=options)
        track(0, {"eval/kl_nats": 3.0, "eval/kd_loss": float("nan")})
        for step in (5, 10):
            clock = {"train/tokens_seen": 100 * step, "train/seconds": 2.0 * step}
            track(step, {"train/loss": 1.0 / step + number, **clock})
        track(10, {"eval/kl_nats": 0.5 + number, "eval/perplexity": 20.0})
        track.finish({"bits_per_weight": 2.5})
        folders.append(str(folder))
    here, there = tmp_path / "here", tmp_path / "there"
    assert main("compare", [*folders, "--output", str(here)]) == 0
    assert main("compare", ["--wandb-project", "p", "--output", str(there)]) == 0
    capsys.readouterr()
    assert (there / "compare.md").read_text() == (here / "compare.md").read_text()
    assert (there / "compare.png").read_bytes() == (here / "compare.png").read_bytes()
    words = ["--wandb-project", "p", "--wandb-group", "speedrun", "--output", str(there)]
    assert main("compare", words) == 0
    assert [run["run"] for run in json.loads(capsys.readouterr().out)["runs"]] == ["run0"]


def test_a_project_without_runs_is_told(capsys, project):
    """So are a group without a project and a call without anything."""
    for words in (["--wandb-project", "p"], ["--wandb-group", "g"], []):
        assert main("compare", words) == 2
        assert "--wandb-project" in capsys.readouterr().err


def test_an_absent_run_is_one_line_and_code_2(tmp_path, capsys):
    """What the user can fix is said in one line, without a traceback."""
    assert main("compare", [str(tmp_path / "absent")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert str(tmp_path / "absent") in err
