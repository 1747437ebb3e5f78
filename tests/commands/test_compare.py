import json

from qat.commands import compare
from qat.tracking.record import RunRecord


def test_the_closing_line_holds_numbers_and_paths(tmp_path, capsys):
    """`qat compare` ends with one JSON line; its table goes to standard error."""
    RunRecord(tmp_path / "run").log(1, {"train/loss": 0.5})
    code = compare.main([str(tmp_path / "run"), "--output", str(tmp_path / "out")])
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
    assert compare.main([*arguments, "--wandb-project", "tests"]) == 0
    json.loads(capsys.readouterr().out)
    media = [path.name for path in tmp_path.glob("out/wandb/offline-run-*/files/media/**/*")]
    assert any(name.endswith(".table.json") for name in media)
    assert any(name.endswith(".html") for name in media)


def test_an_absent_run_is_one_line_and_code_2(tmp_path, capsys):
    """What the user can mend is said in one line, without a traceback."""
    assert compare.main([str(tmp_path / "absent")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert str(tmp_path / "absent") in err
