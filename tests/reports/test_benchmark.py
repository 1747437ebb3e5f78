import pytest

from qat.reports.benchmark import results_of, results_table, write_report

FACTS = {
    "identity": {
        "model": {"name": "tiny"},
        "mode": "mlp",
        "dtype": "bf16",
        "seq_len": 64,
        "cache": None,
        "steps": 3,
        "memory_limit": 6.0,
        "versions": {"qat": "0.1.0"},
    },
    "environment": {
        "device": "device cpu",
        "machine": "Linux",
        "started": "2026-01-02T03:04:05+00:00",
    },
    "chip": None,
    "compiles_steps": False,
}


def row(batch, rate, configuration="baseline"):
    return {
        "configuration": configuration,
        "batch": batch,
        "status": "OK",
        "step_seconds": batch * 64 / rate,
        "tokens_per_second": rate,
        "tokens_per_second_spread": [rate - 1, rate + 1],
        "mfu": 0.25,
        "peak_bytes": 1_000_000_000 * batch,
        "warm_up_seconds": 9.0,
        "loss": 8.088,
    }


def too_large(batch, configuration="baseline"):
    return {"configuration": configuration, "batch": batch, "status": "OOM", "why": "killed"}


def rows():
    both = [row(8, 100.0), row(16, 90.0), too_large(24)]
    return [*both, row(8, 50.0, "checkpointing"), row(32, 80.0, "checkpointing")]


def test_the_largest_is_not_the_fastest():
    """Both are told, of each configuration and of all."""
    results = results_of(rows(), FACTS, is_search=True)
    assert (results["max_batch"], results["best_batch"]) == (32, 8)
    assert (results["tokens_per_second"], results["peak_bytes"]) == (100.0, 16_000_000_000)
    assert results["probes"] == 5
    assert results["configurations"]["checkpointing"]["max_batch"] == 32
    assert [one["status"] for one in results["rows"]] == ["OK", "MAX", "OOM", "OK", "MAX"]


def test_sizes_that_were_given_are_no_maximum():
    """A larger one may fit as well."""
    results = results_of(rows(), FACTS, is_search=False)
    assert results["max_batch"] is None
    assert "MAX" not in {one["status"] for one in results["rows"]}


def test_where_nothing_fits_it_is_told():
    """With the smallest that was tried."""
    with pytest.raises(ValueError, match="batch 1 does not fit: killed; shorten --seq-len"):
        results_of([too_large(1), too_large(2)], FACTS, is_search=True)


def test_one_configuration_may_not_fit_at_all():
    """The other is told all the same."""
    both = [too_large(1), row(8, 50.0, "checkpointing")]
    results = results_of(both, FACTS, is_search=True)
    assert results["configurations"]["baseline"]["max_batch"] == 0
    assert results["max_batch"] == 8


def test_the_table_is_the_seeds():
    """On a device that compiles with the seconds of it."""
    results = results_of(rows(), FACTS, is_search=True)["rows"]
    table = results_table(results[:3], compiles_steps=False)
    assert table.header == ["Batch", "Step(s)", "Memory", "t/s", "Loss", "Status"]
    assert table.rows[1:] == [
        ["16", "11.378", "16,000M", "90", "8.09", "MAX"],
        ["24", "-", "-", "-", "-", "OOM"],
    ]
    table = results_table(results[:3], compiles_steps=True)
    assert table.header[1] == "Compile(s)"
    assert {len(cells) for cells in table.rows} == {7}


@pytest.mark.recipe
def test_the_entry_is_ready_for_the_log(tmp_path, capsys):
    """The log finds it by its heading; plot and findings are in it."""
    from qat.reports.log import EMPTY_LOG, ENTRY, add_entry

    results = results_of(rows(), FACTS, is_search=True)
    closing = write_report(tmp_path / "SR-003", results, FACTS, "python speedrun/benchmark.py")
    assert (tmp_path / "SR-003" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    entry = (tmp_path / "SR-003" / "entry.md").read_text()
    for line in (
        "### 2026-01-02: SR-003 - Performance Benchmark",
        "- Memory limit: 6 GB",
        "| 24 | - | - | - | - | OOM |",
        "- **Max batch size: 16** with no gradient checkpointing",
        "- **Best throughput: 100 t/s** (99 to 101) at batch=8 with no gradient checkpointing, "
        "25.0% of the chip's peak",
    ):
        assert line in entry.splitlines(), line
    assert closing["entry"] == str(tmp_path / "SR-003" / "entry.md")
    assert ENTRY.search(add_entry(EMPTY_LOG, "SR-003", entry))["name"] == "SR-003"
    assert "gradient checkpointing" in capsys.readouterr().err
