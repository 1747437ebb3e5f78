import json
import shlex

import pytest

from qat.cli.commands import main
from qat.pipelines.log_run import train_command
from qat.reports.compare import read_run
from qat.reports.log import RUNS_TITLE, add_entry, clock, command_line, read_facts, run_name
from qat.tracking.record import RunRecord
from qat.train.config import TrainConfig

pytestmark = pytest.mark.recipe

HEADER = {
    "format": "qat-student-2",
    "plan": {"name": "q2a4", "tensors": {"layers.0.mlp.up_proj.weight": "lut2-g32"}},
    "base_model": {"name": "tiny"},
    "cache_fingerprint": "c" * 16,
    "sha256": "a" * 64,
    "metrics": {"bits_per_weight_mlp": 2.5},
}
SESSION = {
    "device": "device cpu (asked for)",
    "machine": "Linux, 2 cores",
    "commit": "abc1234",
    "started": "2026-01-02T03:04:05+00:00",
}


@pytest.fixture
def make_run(tmp_path):
    """Write the record of a run that fell from a loss to another."""

    def make(name, last=0.58, sha="a", sessions=(SESSION,), is_ended=True):
        folder = tmp_path / "runs" / name
        record = RunRecord(folder)
        record.write_config(
            {
                "config": {
                    "checkpoint": "runs/q2_init",
                    "cache_dir": "caches/x",
                    "output_dir": str(folder),
                    "layers": "mlp",
                    "max_steps": 4,
                    "batch_size": 8,
                    "optim": {"lr": 5e-5, "schedule": "cosine"},
                    "trainable": ["weights", "scales"],
                    "tracking": {"to": "wandb", "name": "SR 2"},
                },
                "identity": {"settings": {"optim.lr": 5e-5}},
            }
        )
        record.log(0, {"eval/kl_nats": 2.0, "eval/kd_loss": 5.8, "eval/perplexity": 50.0})
        record.log(2, {"train/loss": 1.0, "train/tokens_seen": 100, "train/seconds": 10.0})
        record.log(4, {"train/loss": 0.9, "train/tokens_seen": 200, "train/seconds": 20.0})
        record.log(4, {"eval/kl_nats": last, "eval/kd_loss": last, "eval/perplexity": 20.0})
        if is_ended:
            record.finish({"steps": 4, "best_kl_nats": last})
        (folder / "environment.json").write_text(json.dumps(list(sessions)))
        (folder / "best").mkdir(exist_ok=True)
        header = {**HEADER, "sha256": sha * 64}
        (folder / "best" / "checkpoint.json").write_text(json.dumps(header))
        return folder

    return make


@pytest.fixture
def log(tmp_path):
    return tmp_path / "speedrun" / "log.md"


def run(capsys, folder, log, *argv, name="SR-010", goal="Train MLP layers"):
    words = [folder, "--name", name, "--goal", goal, "--log", log, *argv]
    code = main("log-run", [str(word) for word in words])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def test_an_entry_tells_what_the_record_tells(make_run, log, capsys):
    """Goal, instance, config, command, result, notes, plot: all from the run's own folder."""
    code, values, _ = run(capsys, make_run("q2"), log, "--notes", "plateau after 2", "next: L128")
    assert code == 0
    assert values["run"] == "v2_q2a4_mlp_0.58_fp16"
    text = log.read_text()
    for line in (
        "### 2026-01-02: SR-010 - v2_q2a4_mlp_0.58_fp16",
        "**Goal**: Train MLP layers",
        "**Instance**: device cpu (asked for); Linux, 2 cores",
        "- Training: MLP-only, 4 steps",
        "- Batch: 8, LR: 5e-05 (cosine)",
        "- Commit: abc1234",
        "**Result**: COMPLETE",
        "| Initial kd_loss | 5.8 |",
        "| Final kd_loss | 0.58 |",
        "| **Best kl_nats (held-out)** | 0.58 |",
        "| Improvement | 5.22 (90%) |",
        "| Time | 0min 20s |",
        "| tokens_per_second | 10 |",
        "- plateau after 2",
        "![SR-010](plots/SR-010.png)",
    ):
        assert line in text.splitlines(), line
    assert (log.parent / "plots" / "SR-010.png").read_bytes().startswith(b"\x89PNG")
    assert values["plot"] == str(log.parent / "plots" / "SR-010.png")


def test_the_command_can_be_typed_again(make_run):
    """Its flags give the config that the run had; what is as by default is left out."""
    flags = read_run(make_run("q2"), "q2").config
    words = shlex.split(train_command(flags).replace("\\\n", " "))
    assert words[:2] == ["qat", "train"]
    assert "--batch-size" not in words
    import tyro

    again = tyro.cli(TrainConfig, args=words[2:])
    assert (again.optim.lr, again.max_steps, again.layers) == (5e-5, 4, "mlp")
    assert (again.tracking.to, again.tracking.name) == ("wandb", "SR 2")
    assert str(again.output_dir) == flags["output_dir"]
    assert command_line("x", {"a_b": False, "c": None}, {"a_b": True}) == "x \\\n    --no-a-b"


def test_the_table_follows_from_the_entries(make_run, log, capsys):
    """One row a run, in order; the best of each cache in bold."""
    run(capsys, make_run("one", last=0.7, sha="1"), log, name="SR-001")
    run(capsys, make_run("two", last=0.6, sha="2"), log, name="SR-002")
    text = log.read_text()
    table = text[: text.index(RUNS_TITLE)]
    rows = [line for line in table.splitlines() if line.startswith("| SR")]
    assert [row.split("|")[1].strip() for row in rows] == ["SR-001", "SR-002"]
    assert "**0.6**" in rows[1]
    assert "**" not in rows[0]
    assert [facts["name"] for facts in read_facts(text)] == ["SR-001", "SR-002"]


def test_the_same_run_is_written_anew_and_another_is_not(make_run, log, capsys):
    """A name stands for one run; what people wrote around it stays."""
    first = make_run("one", sha="1")
    run(capsys, first, log, name="SR-001", goal="first")
    run(capsys, make_run("two", sha="2"), log, name="SR-002")
    text = log.read_text()
    by_hand = "By hand.\n\n## Fits compared\n\nRows."
    log.write_text(text.replace("## Records", f"{by_hand}\n\n## Records"))
    assert run(capsys, first, log, name="SR-001", goal="second")[0] == 0
    text = log.read_text()
    assert "**Goal**: first" not in text
    assert text.index("**Goal**: second") < text.index(": SR-002 - ")
    assert by_hand in text
    assert text.count(": SR-001 - ") == 1
    code, _, said = run(capsys, make_run("three", sha="3"), log, name="SR-001")
    assert code == 2
    assert "choose another" in said
    assert log.read_text() == text


def test_sections_after_the_runs_stay_after_them(make_run, log, capsys):
    """The log of the seeds has a section on names below its runs."""
    log.parent.mkdir()
    fence = "```bash\n## no heading\n```\n"
    log.write_text(
        f"# Speedrun Log\n\nOld.\n\n{RUNS_TITLE}\n\n### 2024-12-31: SR-002 - By hand\n\n{fence}\n"
        "## Naming Convention\n\nFormat.\n"
    )
    assert run(capsys, make_run("q2"), log)[0] == 0
    text = log.read_text()
    order = [
        "Old.",
        "SR-002 - By hand",
        "## no heading",
        ": SR-010 - ",
        "## Naming Conv",
        "Format.",
    ]
    places = [text.index(word) for word in order]
    assert places == sorted(places)
    assert text.index("## Records") < places[0]
    code, _, said = run(capsys, make_run("q2"), log, name="SR-002")
    assert code == 2
    assert "in the log already" in said


def test_a_run_that_was_stopped_and_one_that_moved(make_run, log, capsys):
    """Both are told: where it stopped, and every machine it ran on."""
    other = {**SESSION, "machine": "Linux, 96 cores"}
    folder = make_run("q2", sessions=(SESSION, SESSION, other), is_ended=False)
    run(capsys, folder, log)
    text = log.read_text()
    assert "**Result**: STOPPED at step 4" in text
    assert "Linux, 2 cores; then device cpu (asked for); Linux, 96 cores" in text
    run(capsys, folder, log, "--instance", "Colab T4")
    assert "**Instance**: Colab T4" in log.read_text()


def test_a_student_that_was_made_is_logged_too(make_run, log, tmp_path, capsys):
    """A conversion has a summary and a header, no curve and no plot."""
    folder = tmp_path / "runs" / "q2_init"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"kl_nats": 2.1, "kd_loss": 5.83}))
    made_by = {"command": "convert-q4-to-q2", "settings": {"q2_mlp_bits": 2}}
    (folder / "checkpoint.json").write_text(json.dumps({**HEADER, "made_by": made_by}))
    _, values, _ = run(capsys, folder, log, name="SR-001")
    assert values["plot"] is None
    assert values["run"] == "v2_q2a4_init_5.83_fp16"
    text = log.read_text()
    assert "- Made by: `qat convert-q4-to-q2`" in text
    assert "| kd_loss | 5.83 |" in text
    assert "**Instance**: not recorded" in text


def test_what_cannot_be_logged_is_told(make_run, log, tmp_path, capsys):
    """No folder, no record, a name that is no name, a goal of two lines; the log stays."""
    folder = make_run("q2")
    for arguments in (
        {"folder": tmp_path / "none"},
        {"folder": tmp_path},
        {"folder": folder, "name": "SR 10"},
        {"folder": folder, "goal": "two\nlines"},
    ):
        assert run(capsys, arguments.pop("folder"), log, **arguments)[0] == 2
    assert not log.exists()


def test_names_leave_out_what_is_not_known(make_run):
    """Format, preset, what was trained, loss, precision: SPEC's order."""
    trained = read_run(make_run("q2"), "q2")
    assert run_name(trained, {}) == "v2_mlp_0.58"
    tensors = {"layers.0.mlp.up_proj.weight": "lut4-g32-f32", "norm.weight": "f32"}
    wide = {"plan": {"name": "q4a4", "tensors": tensors}}
    assert run_name(trained, wide) == "v2_q4a4_mlp_0.58_fp32"
    assert clock(10_291) == "2h 51min"
    assert add_entry("", "x", "entry\n").strip() == "entry"
