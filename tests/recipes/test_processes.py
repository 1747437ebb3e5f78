"""Commands in several processes: what they give is what one process gives."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from qat.cache import build, shard
from qat.cli.commands import main
from qat.model.surgery import quantized_layers
from qat.pipelines import compress_stages
from qat.pipelines.open_checkpoint import open_checkpoint
from qat.runtime.launch import rank
from qat.storage.files import folder_lock
from qat.tracking.record import read_rows
from qat.train.state import whole_states
from tests.processes import forked, torchrun
from tests.tiny import quantize_plainly, save_student, tiny_cache, tiny_llama, tiny_shards

pytestmark = pytest.mark.recipe
STEPS = 20
CLOSE = 1e-5  # nats between the losses of one process and those of several


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache and a student whose embedding, tied to the head, is quantized as well."""
    folder, plan = tmp_path_factory.mktemp("made"), "q2a4, embed=int4-g32"
    cache = tiny_cache(folder, tiny_llama())
    student = quantize_plainly(tiny_llama(), plan)
    base = {"path": str(folder / "teacher"), "name": "teacher", "weights": None}
    save_student(folder / "student", student, folder / "teacher", plan=plan, base_model=base)
    return folder / "student", cache


def train_flags(made, folder, **changes):
    """Return the flags of a run in which all kinds of parameters train, clipped."""
    flags = {
        "--checkpoint": made[0],
        "--cache-dir": made[1],
        "--output-dir": folder,
        "--max-steps": STEPS,
        "--batch-size": 6,
        "--accumulation-steps": 2,
        "--optim.lr": 1e-3,
        "--optim.clip-grad-norm": 0.5,
        "--intervals.log-steps": 1,
        "--intervals.eval-steps": 10,
        "--device": "cpu",
        "--dtype": "fp32",
        **changes,
    }
    words = [str(word) for item in flags.items() for word in item]
    return [*words, "--trainable", "weights", "scales", "codebooks", "norms"]


def call(command, words):
    """Run a command in this process; return its exit code and what it wrote on both streams."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command, words)
    return code, out.getvalue(), err.getvalue()


def curves(folder):
    """Return losses, gradient norms and held-out numbers of a run, by step and name."""
    names = ("train/loss", "train/grad_norm", "eval/kl_nats_lower")
    rows = read_rows(folder)
    return {(row["step"], name): row[name] for row in rows for name in names if name in row}


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory):
    """The curves of the run in one process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert call("train", train_flags(made, folder))[0] == 0
    return curves(folder)


@pytest.mark.parametrize(("count", "more"), [(2, []), (4, []), (2, ["--shard"])])
def test_processes_train_as_one_does(made, alone, tmp_path, count, more):
    """The same step over the same sequences; 6 of them are no multiple of 4 processes."""
    flags = [*train_flags(made, tmp_path / "run"), *more]
    ended = forked(count, partial(call, "train", flags))
    assert [code for code, _, _ in ended] == [0] * count, ended
    closing = json.loads(ended[0][1])
    assert closing["steps"] == STEPS
    assert closing["tokens_seen"] == STEPS * 2 * 6 * 16
    assert all(out == "" for _, out, _ in ended[1:])
    assert not [line for _, _, err in ended[1:] for line in err.splitlines() if "training" in line]
    assert curves(tmp_path / "run") == pytest.approx(alone, abs=CLOSE, rel=0)


def test_an_error_of_one_ends_all_with_one_line(made, tmp_path):
    """By torchrun itself: rank 0 finds the run's folder in use, which only it looks at."""
    with folder_lock(tmp_path / "run"):
        process = torchrun(2, "train", *train_flags(made, tmp_path / "run"))
        out, err = process.communicate(timeout=240)
    assert process.returncode != 0
    assert out == ""
    lines = [line for line in err.splitlines() if re.match("error: |Traceback .qat", line)]
    assert len(lines) == 1, err
    assert lines[0].startswith(f"error: rank 0: {tmp_path / 'run'} is in use by process ")
    assert not (Path(tmp_path) / "run").exists()


def test_one_line_where_all_find_the_same_error(made, tmp_path):
    """More processes than a micro-batch has sequences."""
    flags = train_flags(made, tmp_path / "run", **{"--batch-size": 1})
    ended = forked(2, partial(call_to_the_end, "train", flags))
    assert sorted(code for code, _ in ended) == [2, 2]
    said = [line for _, err in ended for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert said[0].endswith("--batch-size 1 is shared by 2 processes; give 2 or more")


def children_of(process):
    """Return the process ids of those that a process has started."""
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def test_a_run_killed_in_a_save_goes_on_in_any_number_of_processes(made, alone, tmp_path):
    """One of two that split the weights, by torchrun; then one, and four, end as one alone does."""
    folder = tmp_path / "run"
    flags = train_flags(made, folder, **{"--intervals.save-steps": 1})
    process = torchrun(2, "train", *flags, "--shard")
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        states = sorted(folder.glob("state/step_*"))
        if len(states) > 1 and not (states[-1] / "state.json").exists():
            os.kill(int(children_of(process)[-1]), signal.SIGKILL)
            break
        time.sleep(0.001)
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0, err
    assert "SIGKILL" in err
    saved = whole_states(folder / "state")[-1]
    assert 0 < int(saved.name.removeprefix("step_")) < STEPS
    for count, more in ((1, []), (4, ["--shard"])):
        again = shutil.copytree(folder, tmp_path / f"in_{count}")
        ended = forked(count, partial(call, "train", [*train_flags(made, again), *more]))
        assert [code for code, _, _ in ended] == [0] * count, ended
        assert "resuming from step" in ended[0][2]
        assert curves(again) == pytest.approx(alone, abs=CLOSE, rel=0)


def pretrain_flags(made, folder, last_batch=4):
    """Return the flags of a new model's run, whose blocks grow and whose batches shrink."""
    texts = f"words={made[0].parent / 'records.jsonl'}"
    flags = ["--arch", made[0].parent / "teacher", "--output-dir", folder, "--eval-sets", texts]
    flags += ["--data-dir", made[0].parent / "tokens" / "shards", "--max-steps", 8]
    flags += ["--curriculum", f"8:6:0,16:{last_batch}:4", "--accumulation-steps", 2]
    flags += ["--optim.lr", 3e-3, "--intervals.log-steps", 1, "--intervals.eval-steps", 4]
    flags += ["--intervals.save-steps", 2, "--intervals.keep-states", 4]
    return [str(flag) for flag in [*flags, "--device", "cpu", "--dtype", "fp32"]]


def pretraining_curves(folder):
    """Return losses, gradient norms and held-out numbers of a new model's run."""
    names = ("train/loss", "train/grad_norm", "train/tokens_seen")
    names += ("eval/perplexity", "eval/words/perplexity")
    rows = read_rows(folder)
    return {(row["step"], name): row[name] for row in rows for name in names if name in row}


def test_processes_make_a_new_model_as_one_does(made, tmp_path):
    """The same losses across stages; after 2 steps of one, two go on, and the other way round."""
    if not (made[0].parent / "tokens").exists():
        (made[0].parent / "tokens").mkdir()
        tiny_shards(made[0].parent / "tokens")
    assert call("pretrain", pretrain_flags(made, tmp_path / "alone"))[0] == 0
    expected = pretraining_curves(tmp_path / "alone")
    assert expected[8, "train/tokens_seen"] == 4 * 2 * 6 * 8 + 4 * 2 * 4 * 16
    ended = forked(2, partial(call, "pretrain", pretrain_flags(made, tmp_path / "two")))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert all(out == "" for _, out, _ in ended[1:])
    assert pretraining_curves(tmp_path / "two") == pytest.approx(expected, abs=CLOSE, rel=CLOSE)
    for source, count in (("two", 1), ("alone", 2)):
        again = shutil.copytree(tmp_path / source, tmp_path / f"{source}_again")
        (again / "summary.json").unlink()
        for state in sorted(again.glob("state/step_*"))[1:]:
            shutil.rmtree(state)
        words = pretrain_flags(made, again)
        ended = forked(count, partial(call, "pretrain", words))
        assert [code for code, _, _ in ended] == [0] * count, ended
        assert pretraining_curves(again) == pytest.approx(expected, abs=CLOSE, rel=CLOSE)
    few = pretrain_flags(made, tmp_path / "few", last_batch=1)
    assert "--batch-size 1 is shared by 2 processes" in "".join(
        err for _, err in forked(2, partial(call_to_the_end, "pretrain", few))
    )


@pytest.mark.parametrize("on", ["cache", "texts"])
def test_processes_measure_as_one_does(made, on):
    """To the bit: they measure whole batches, and what these sum up to is added in order."""
    records = made[0].parent / "records.jsonl"
    of = ["--cache-dir", made[1]] if on == "cache" else ["--perplexity", records, "--window", 16]
    words = ["--checkpoint", made[0], *of, "--batch-size", 2, "--device", "cpu", "--dtype", "fp32"]
    words = [*map(str, words)]
    alone = json.loads(call("evaluate", words)[1])
    ended = forked(2, partial(call, "evaluate", words))
    assert json.loads(ended[0][1]) == alone
    assert ended[1][:2] == (0, "")
    assert (alone if on == "cache" else alone["domains"]["records"])["tokens"] > 0


@pytest.mark.parametrize("content", ["top-k", "hidden"])
def test_processes_build_the_cache_of_one(made, tmp_path, monkeypatch, content):
    """The same bytes, also where one of them dies after its first shard and all start again."""
    monkeypatch.setattr(shard, "TOKENS_A_SHARD", 128)
    teacher = made[0].parent / "teacher"
    flags = ["--teacher", teacher, "--data", teacher.parent / "records.jsonl", "--seq-len", 16]
    flags += ["--batch-size", 4, "--content", content, "--name", "it"]
    flags += ["--top-k", 8] * (content == "top-k") + ["--device", "cpu", "--dtype", "fp32"]
    flags = [str(flag) for flag in [*flags, "--output-dir"]]
    assert call("build-cache", [*flags, str(tmp_path / "alone")])[0] == 0
    words = [*flags, str(tmp_path / "several")]
    forked(2, partial(call_until_killed, "build-cache", words))
    folder = tmp_path / "several" / "it"
    left = {path.name for path in folder.glob("shard_*")}
    assert left
    assert not (folder / "manifest.json").exists()
    ended = forked(2, partial(call, "build-cache", words))
    assert [code for code, _, _ in ended] == [0, 0], ended
    expected = contents_of(tmp_path / "alone" / "it")
    assert left < expected.keys()
    assert contents_of(folder) == expected


@pytest.mark.parametrize(("fit", "share"), [("moments", 1e-6), ("hessian", 0.3)])
def test_processes_fit_as_one_does(made, tmp_path, fit, share):
    """By statistics of all text, of which each reads a part.

    Sums are as equal as those of floats are. Of the halves of the text that choose a correction
    they are not, so only what no other weight's error comes before is fitted to the same codes.
    """
    flags = ["--model", made[0].parent / "teacher", "--plan", "q2a4, embed=int4-g32"]
    flags += ["--cache-dir", made[1], "--fit", fit, "--device", "cpu", "--dtype", "fp32"]
    flags = [str(flag) for flag in [*flags, "--output"]]
    code, out, err = call("init-student", [*flags, str(tmp_path / "alone")])
    assert code == 0, err
    ended = forked(2, partial(call, "init-student", [*flags, str(tmp_path / "two")]))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert ended[1][1] == ""
    alone, two = (open_checkpoint(tmp_path / name).load() for name in ("alone", "two"))
    expected = quantized_layers(alone)
    for name, layer in quantized_layers(two).items():
        wanted = expected[name].fake_quantized_weight()
        error = (layer.fake_quantized_weight() - wanted).square().mean()
        bound = 1e-6 if name.endswith("layers.0.self_attn.q_proj") else share
        assert error < bound * wanted.square().mean(), name
    closing = [json.loads(one) for one in (out, ended[0][1])]
    kls = [one["kl_nats_lower"] for one in closing]
    assert kls[1] == pytest.approx(kls[0], rel=max(0.01, share / 2))


def test_more_processes_than_sequences_are_refused(made, tmp_path):
    """Each has to read something."""
    flags = ["--model", made[0].parent / "teacher", "--plan", "q2a4", "--cache-dir", made[1]]
    flags += ["--calibration-sequences", 1, "--device", "cpu", "--output", tmp_path / "student"]
    ended = forked(2, partial(call_to_the_end, "init-student", [str(flag) for flag in flags]))
    said = "".join(err for _, err in ended)
    assert "1 sequences calibrate in 2 processes; start fewer, or give more text" in said


def test_processes_make_a_file_as_one_does(made, tmp_path):
    """Costs, fit and training shared: the same formats, a student as near; found again."""
    flags = ["--model", made[0].parent / "teacher", "--data", made[0].parent / "records.jsonl"]
    flags += ["--bits-per-weight", 6, "--to", "gguf", "--minutes", 0.2, "--seq-len", 16]
    flags += ["--num-sequences", 64, "--batch-size", 4, "--device", "cpu", "--dtype", "fp32"]
    closing = {}
    for name, count in (("alone", 1), ("two", 2), ("two", 2)):
        words = [str(flag) for flag in [*flags, "--output", tmp_path / f"{name}.gguf"]]
        ended = forked(count, partial(call, "compress", words))
        assert [code for code, _, _ in ended] == [0] * count, ended
        assert all(out == "" for _, out, _ in ended[1:])
        found = json.loads(ended[0][1])
        assert closing.setdefault(name, found) == found
    alone, two = closing["alone"], closing["two"]
    assert (tmp_path / "two.gguf").stat().st_size == two["file_bytes"]
    assert two["file_bytes"] == pytest.approx(alone["file_bytes"], rel=0.02)
    # Each process draws labels of its own, of a thousand tokens in all.
    assert two["kl_nats_predicted"] == pytest.approx(alone["kl_nats_predicted"], rel=0.5)
    assert two["kl_nats_fit"] == pytest.approx(alone["kl_nats_fit"], rel=0.5)
    assert two["kl_nats_validation"] <= two["kl_nats_fit"]


def test_a_file_of_killed_processes_is_that_of_whole_ones(made, tmp_path):
    """One of two is killed as it enters each stage; then both end, and nothing else is left."""
    flags = ["--model", made[0].parent / "teacher", "--data", made[0].parent / "records.jsonl"]
    flags += ["--bits-per-weight", 6, "--to", "gguf", "--minutes", 0, "--seq-len", 16]
    flags += ["--num-sequences", 64, "--device", "cpu", "--dtype", "fp32", "--output"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = {one: [*map(str, flags), str(one / "small.gguf")] for one in (whole, killed)}
    closing = {}
    for folder, stages in ((whole, ()), (killed, ("build_cache", "measure_costs", "quantize"))):
        for stage in stages:
            with pytest.raises(AssertionError, match="ended without a word"):
                forked(2, partial(call_killed_at, stage, "compress", words[folder]))
            assert not (folder / "small.gguf").exists()
        ended = forked(2, partial(call, "compress", words[folder]))
        assert [code for code, _, _ in ended] == [0, 0], ended
        closing[folder] = json.loads(ended[0][1])
    for name in ("kl_nats", "kl_nats_predicted", "plan", "file_bytes"):
        assert closing[killed][name] == closing[whole][name], name
    assert (killed / "small.gguf").read_bytes() == (whole / "small.gguf").read_bytes()
    assert names_below(killed) == names_below(whole)


def names_below(folder):
    """Return the paths of all files in a folder, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def call_killed_at(stage, command, words):
    """Run a command whose process of rank 1 is killed as it enters a stage."""
    if rank() == 1:
        setattr(compress_stages, stage, lambda *_args, **_kw: os.kill(os.getpid(), signal.SIGKILL))
    return call_to_the_end(command, words)


def contents_of(folder):
    """Return the bytes of each file in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def call_until_killed(command, words):
    """Run a command whose process of rank 1 fails as it begins its second shard."""
    write, written = build.write_shard, []

    def write_once(*arguments):
        written.append(arguments)
        if rank() == 1 and len(written) == 2:
            raise OSError("the machine went away")
        return write(*arguments)

    build.write_shard = write_once
    return call_to_the_end(command, words)


def call_to_the_end(command, words):
    """Return exit code and messages, also where a process ends without a word."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            return main(command, words), err.getvalue()
        except SystemExit as stop:
            return stop.code, err.getvalue()


def test_other_commands_run_in_one_process(tmp_path):
    """What would do its work once in each process is refused."""
    ended = forked(2, partial(call_to_the_end, "doctor", []))
    assert {code for code, _ in ended} == {2}
    said = "".join(err for _, err in ended)
    assert said.count("`qat doctor` runs in one process; call it without torchrun") == 1
