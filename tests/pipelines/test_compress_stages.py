"""Parts of a compression that leave their results and find them again; whole: test_compress."""

from types import SimpleNamespace

import pytest
import torch

from qat.pipelines import compress_stages
from qat.pipelines.compress_stages import (
    FINAL_FIT,
    FIRST_FIT,
    SHORT_FIT,
    TIGHT_FIT,
    Clock,
    Measured,
    MeasuredCosts,
    calibration_tokens,
    fit_sequences,
    fit_tokens,
    grams_file,
    measuring_dtype,
    once,
    read_grams,
    size_on_disk,
    write_grams,
)
from qat.pipelines.fit_layers import OutputGrams


def test_a_clock_goes_on_in_the_next_process(tmp_path, monkeypatch):
    """What earlier ones noted counts towards the limit; what they did not note is lost."""
    now = [100.0]
    monkeypatch.setattr(compress_stages.time, "perf_counter", lambda: now[0])
    first = Clock(tmp_path / "clock.json", minutes=1)
    now[0] += 20
    assert (first.seconds, first.left) == (20, 40)
    first.note()
    now[0] = 7.0  # another process counts from elsewhere
    second = Clock(tmp_path / "clock.json", minutes=1)
    now[0] += 5
    assert (second.seconds, second.left) == (25, 35)


def test_a_part_is_made_once_for_what_decides_it(tmp_path):
    """The same key finds it, another one makes it anew."""
    calls = []

    def make():
        calls.append(1)
        return {"steps": len(calls)}

    path = tmp_path / "parts" / "a.json"
    kind = dict[str, int]
    for key, steps in ((1, 1), (1, 1), (2, 2)):
        assert once(path, ["a", key, None], make, kind) == {"steps": steps}
    assert len(calls) == 2


def test_a_folder_is_as_large_as_its_files(tmp_path):
    """In folders of any depth; of a single file, that one's."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").write_bytes(b"123")
    (tmp_path / "a" / "b" / "y").write_bytes(b"4567")
    assert size_on_disk(tmp_path) == 7
    assert size_on_disk(tmp_path / "a" / "x") == 3


@pytest.mark.parametrize(
    ("value", "kind"), [("a", float), ({"costs": {"w": [1]}}, MeasuredCosts), ({}, Measured)]
)
def test_what_is_kept_is_of_its_kind(tmp_path, value, kind):
    """A changed value ended in a traceback where it was used."""
    path = tmp_path / "kept.json"
    once(path, "key", lambda: value, object)
    with pytest.raises(ValueError, match=r"kept\.json: .*; remove it"):
        once(path, "key", lambda: pytest.fail("it is there"), kind)


def test_grams_are_read_as_they_were_written(tmp_path):
    """Runs in their order, whatever their number, and that of the embedding."""
    runs = {"a.b": [torch.full((2, 2), float(k)) for k in range(11)], "c": [torch.eye(3)]}
    source = SimpleNamespace(work=tmp_path)
    write_grams(grams_file(source), OutputGrams(runs=runs, embedding=torch.eye(5)))
    found = read_grams(source)
    assert found.runs.keys() == runs.keys()
    for name, grams in runs.items():
        assert all(map(torch.equal, found.runs[name], grams))
    assert torch.equal(found.embedding, torch.eye(5))


@pytest.mark.parametrize("rate", [50.0, 600.0, 1e6])
@pytest.mark.parametrize("kind", [TIGHT_FIT, SHORT_FIT, FIRST_FIT, FINAL_FIT])
def test_a_fit_ends_within_its_share_of_the_minutes(kind, rate):
    """Whatever cache and costs took; with more time left it reads more."""
    former = 0
    for limit in (300.0, 1800.0, 7200.0):
        for left in (0.2 * limit, 0.5 * limit, 0.9 * limit):
            tokens = fit_tokens(kind, limit, left, rate)
            taken = (kind.fixed_tokens + compress_stages.FIT_PASSES * tokens) / rate
            assert tokens == 0 or limit - left + taken <= kind.share * limit + 1e-6
        assert tokens >= former
        former = tokens


def test_a_fit_s_text_is_counted_once(tmp_path, monkeypatch):
    """A run that goes on has less time left; kinds of fits do not share it, nor other minutes."""
    source = source_of(10, work=tmp_path, minutes=30.0)
    cache = SimpleNamespace(num_text=10**6, seq_len=64, fingerprint="text")
    near, far = (SimpleNamespace(cost=cost) for cost in (0.1, 0.5))
    monkeypatch.setattr(compress_stages, "forward_tokens_per_second", lambda source: 500.0)

    def count(found, left, limit=1800.0):
        clock = SimpleNamespace(limit=limit, left=left)
        return 64 * fit_sequences(found, source, cache, clock)

    first = count(near, 1300.0)
    assert first == 64 * (fit_tokens(FINAL_FIT, 1800.0, 1300.0, 500.0) // 64)
    assert count(near, 100.0) == first > count(near, 1100.0, 1700.0)
    assert count(far, 1300.0) != first
    assert count(far, 0.0) == count(far, 1300.0)


@pytest.mark.parametrize(
    ("num_text", "expected"), [(1500, 96_000), (2000, 128_000), (10**4, 262_144), (1, 64)]
)
def test_a_fit_reads_all_text_up_to_a_limit(num_text, expected):
    """What the cache keeps as text was chosen by the time there is."""
    assert calibration_tokens(source_of(10), 64 * num_text) == expected
    assert calibration_tokens(source_of(10, fit="moments"), 64 * num_text) <= 4096


@pytest.mark.parametrize("memory", [12 * 10**9, 24 * 10**9])
def test_wide_models_and_small_machines_calibrate_on_less_text(memory):
    """What a decoder layer's linears keep of every token stays within its share of the memory."""
    source = source_of(100_000, memory)
    tokens = calibration_tokens(source, 64 * 10**4)
    kept = 4 * tokens * 2 * (100_000 + 100_000)  # two linears, inputs and outputs
    most = compress_stages.CALIBRATION_SHARE * memory
    assert 0.9 * most < kept <= most


@pytest.mark.parametrize(("memory", "is_exact"), [(None, True), (24 * 10**9, True), (10**9, False)])
def test_files_are_measured_in_float32_where_two_models_fit(memory, is_exact):
    """Of 135 million weights a gigabyte holds one and not two."""
    source = SimpleNamespace(
        size=SimpleNamespace(num_weights=135 * 10**6),
        place=SimpleNamespace(
            dtype=torch.bfloat16, device=SimpleNamespace(total_bytes=lambda: memory)
        ),
    )
    assert (measuring_dtype(source) == torch.float32) == is_exact


def source_of(width, memory=24 * 10**9, fit="hessian", *, work=None, minutes=0.0):
    """Return what is asked of a source: two decoder layers of two square linears and a norm."""
    shapes = {"embed.weight": (1000, width), "norm.weight": (width,)}
    for layer in (0, 1):
        shapes |= {f"layers.{layer}.{one}.weight": (width, width) for one in ("up", "down")}
        shapes[f"layers.{layer}.norm.weight"] = (width,)
    device = SimpleNamespace(total_bytes=lambda: memory)
    tensors = {name: SimpleNamespace(shape=shape) for name, shape in shapes.items()}
    return SimpleNamespace(
        config=SimpleNamespace(fit=fit, seq_len=64, minutes=minutes, is_quick=False),
        size=SimpleNamespace(tensors=tensors),
        place=SimpleNamespace(device=SimpleNamespace(eager=lambda: device)),
        work=work,
    )
