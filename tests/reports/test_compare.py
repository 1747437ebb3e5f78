import pytest

from qat.reports.compare import Run, along, compare_runs, numbers_of, numbers_table, settings_table
from qat.tracking.record import RunRecord


def make_run(folder, losses, **config):
    """Write a run of 64 tokens and 2 seconds a step, with one evaluation at each end."""
    record = RunRecord(folder)
    record.write_config({"output_dir": str(folder), **config})
    record.log(0, {"eval/kl_nats": 9.0})
    for step, loss in enumerate(losses, start=1):
        clock = {"train/tokens_seen": 64 * step, "train/seconds": 2.0 * step}
        record.log(step, {"train/loss": loss, **clock})
    record.log(len(losses), {"eval/kl_nats": losses[-1] / 2})
    return folder


@pytest.mark.recipe
def test_the_comparison_names_what_differs_and_the_best(tmp_path):
    """Two runs: differing settings only, final and best numbers of each, three files."""
    first = make_run(tmp_path / "a", [4.0, 2.0], lr=1e-4, seed=1, quant={"bits": 2})
    second = make_run(tmp_path / "b", [4.0, 1.0], lr=3e-4, seed=1, quant={"bits": 4})
    made = compare_runs([first, second], tmp_path / "out")
    assert made.settings.header == ["setting", "a", "b"]
    assert made.settings.rows == [["lr", "0.0001", "0.0003"], ["quant.bits", "2", "4"]]
    numbers = [dict(zip(made.numbers.header, row, strict=True)) for row in made.numbers.rows]
    assert [row["best_kl_nats"] for row in numbers] == [1.0, 0.5]
    assert numbers[0]["best_step"] == numbers[0]["steps"] == 2
    assert numbers[0]["tokens_per_second"] == 128 / 4.0
    assert "final_perplexity" not in numbers[0]
    assert made.plot.read_bytes().startswith(b"\x89PNG")
    assert "| quant.bits | 2 | 4 |" in made.markdown.read_text()


@pytest.mark.recipe
def test_the_page_needs_no_other_file_and_escapes_names(tmp_path):
    """The HTML holds the plot itself, asks nothing of the network, and no name is markup."""
    made = compare_runs([make_run(tmp_path / "<b>|x", [1.0])], tmp_path / "out")
    page, text = made.page.read_text(), made.markdown.read_text()
    assert "data:image/png;base64," in page
    assert not any(word in page for word in ("http:", "https:", "<script", "<link", "<b>"))
    assert "&lt;b&gt;|x" in page
    assert "<b>\\|x" in text


@pytest.mark.recipe
def test_a_folder_that_is_no_run_is_left_out(tmp_path):
    """`qat compare runs/demo/*` meets other folders and files; they are named, not fatal."""
    run = make_run(tmp_path / "run", [1.0])
    other, file = tmp_path / "export", tmp_path / "note.txt"
    other.mkdir()
    file.write_text("x")
    assert compare_runs([run, other, file], tmp_path / "out").skipped == [other, file]


def test_a_run_with_a_summary_alone_has_numbers_and_no_plot(tmp_path):
    """A conversion logs no curve; its closing numbers are compared all the same."""
    RunRecord(tmp_path / "q4").finish({"kl_nats": 0.2, "bits_per_weight": 4.5})
    made = compare_runs([tmp_path / "q4"], tmp_path / "out")
    assert made.plot is None
    assert made.numbers.header == ["run", "final_kl_nats", "bits_per_weight"]
    assert made.numbers.rows == [["q4", 0.2, 4.5]]


@pytest.mark.recipe
def test_equal_folder_names_are_told_apart(tmp_path):
    """Two runs called `mlp` in two places keep their whole paths."""
    runs = [make_run(tmp_path / place / "mlp", [1.0]) for place in ("x", "y")]
    made = compare_runs(runs, tmp_path / "out")
    assert [row[0] for row in made.numbers.rows] == [str(run) for run in runs]


def test_an_evaluation_between_logged_steps_is_placed_by_interpolation():
    """Tokens of step 5 lie halfway between those of steps 0 and 10."""
    rows = {5: {"eval/kl_nats": 1.0}, 10: {"train/tokens_seen": 640}}
    assert along(Run("r", {}, rows, {}), "eval/kl_nats", "train/tokens_seen") == ([320.0], [1.0])


def test_null_numbers_are_no_numbers():
    """A NaN that was logged as null is neither best nor final."""
    rows = {1: {"eval/kl_nats": 2.0}, 2: {"eval/kl_nats": None}}
    numbers = numbers_of(Run("r", {}, rows, {}))
    assert (numbers["best_kl_nats"], numbers["best_step"], numbers["steps"]) == (2.0, 1, 2)


def test_runs_without_config_do_not_make_every_setting_differ():
    """Only runs that tell their settings are compared by them."""
    told, silent = Run("a", {"lr": 1}, {}, {}), Run("b", {}, {}, {})
    assert settings_table([told, silent]).rows == []


def test_what_is_missing_is_said_before_anything_is_written(tmp_path):
    """An absent folder, and a call without any run, are refused."""
    run = make_run(tmp_path / "run", [1.0])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        compare_runs([run, tmp_path / "absent"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="name run folders"):
        compare_runs([tmp_path / "empty"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bounds_and_exact_distances_have_columns_of_their_own(tmp_path):
    """A lower bound never stands under the exact number's name; each run's best step is its own."""
    exact = Run("exact", {}, {1: {"eval/kl_nats": 2.0, "eval/kl_nats_lower": 0.1}}, {})
    bound = Run("bound", {}, {1: {"eval/kl_nats_lower": 3.0}, 2: {"eval/kl_nats_lower": 1.0}}, {})
    table = numbers_table([exact, bound])
    first, second = (dict(zip(table.header, row, strict=True)) for row in table.rows)
    assert (first["best_kl_nats"], first["best_step"]) == (2.0, 1)
    assert (second["best_kl_nats"], second["best_kl_nats_lower"], second["best_step"]) == (
        None,
        1.0,
        2,
    )
