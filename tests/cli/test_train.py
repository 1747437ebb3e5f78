import json
import re
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch

from qat.model.checkpoint import read_checkpoint, read_header
from qat.model.surgery import quantized_layers
from qat.pipelines.open_checkpoint import load_model
from qat.storage.files import read_json, write_json
from qat.tracking.record import SETTINGS, read_config, read_rows, read_summary
from tests.seeds import make_v2
from tests.tiny import tiny_cache, tiny_llama, tiny_qwen3, tiny_tokenizer

pytestmark = pytest.mark.recipe

USUAL = {
    "layers": "mlp",
    "max_steps": 4,
    "batch_size": 2,
    "intervals.log_steps": 1,
    "optim.warmup_steps": 1,
}
OFTEN = {"intervals.save_steps": 2, "intervals.eval_steps": 2}
DIVERGING = {
    "optim.lr": 1e30,
    "optim.schedule": "constant",
    "optim.clip_grad_norm": 0.0,
    "max_steps": 6,
}
TIMES = ("train/seconds", "train/tokens_per_second")


@pytest.fixture(scope="module")
def flags(path):
    """The flags of a short run."""
    return {"checkpoint": path.q2, "cache_dir": path.cache, **USUAL}


@pytest.fixture(scope="module")
def trained(run, flags, tmp_path_factory):
    """A finished run that no test changes."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, run("train", output_dir=folder, **OFTEN, **flags)


@contextmanager
def files_of_at_most(num_bytes):
    """Let the kernel refuse to write larger files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def rows_of(folder):
    """Return the rows of a run without what the clock says."""
    return [
        {name: value for name, value in row.items() if name not in TIMES}
        for row in read_rows(folder)
    ]


def weights_of(folder):
    return {
        name: layer.fake_quantized_weight()
        for name, layer in quantized_layers(read_checkpoint(folder)[0]).items()
    }


def test_the_closing_line_tells_of_the_run(trained):
    """All keys of the specification; the summary on disk says the same."""
    folder, done = trained
    assert done.code == 0, done.said
    closing = done.closing
    assert closing.keys() >= {"checkpoint", "best_kl_nats_lower", "final_loss", "steps"}
    assert closing["checkpoint"] == str(folder / "best")
    assert closing["steps"] == 4
    assert closing["tokens_seen"] == 4 * 2 * 16
    assert closing["tokens_per_second"] > 0
    summary = read_summary(folder)
    assert {name: closing[name] for name in summary} == summary


def test_a_run_leaves_its_record_and_both_students(trained, path):
    """Config, every step's row, the best and the last student, a state to resume from."""
    folder, done = trained
    names = {entry.name for entry in folder.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "summary.json", "best", "final", "state"}
    assert not any(name.startswith(".") for name in names)
    rows = read_rows(folder)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/kl_nats_lower" in row] == [0, 2, 4]
    best = min(row["eval/kl_nats_lower"] for row in rows if "eval/kl_nats_lower" in row)
    assert done.closing["best_kl_nats_lower"] == best
    header = read_header(folder / "best")
    assert header.metrics["kl_nats_lower"] == best
    assert header.made_by["command"] == "train"
    assert path.cache.name.endswith(header.cache_fingerprint)
    assert header.plan == read_header(path.q2).plan


def test_only_what_was_chosen_trains(trained, path):
    """--layers mlp: attention is the same to the bit, MLP weights moved."""
    before, after = weights_of(path.q2), weights_of(trained[0] / "final")
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == (".mlp." not in name)


def test_the_numbers_are_those_of_evaluate(trained, run, path):
    """A run's best number is what the command says of its best student."""
    folder, done = trained
    found = run("evaluate", checkpoint=folder, cache_dir=path.cache).closing
    assert found["kl_nats_lower"] == pytest.approx(done.closing["best_kl_nats_lower"], rel=1e-6)
    for name in ("bits_per_weight", "bits_per_weight_mlp", "bits_per_weight_model"):
        assert done.closing[name] == found[name] > 2


def test_groups_are_not_written_in_the_seeds_form(trained):
    """Said in one line; no file of theirs and nothing of theirs in the run's record."""
    folder, done = trained
    lines = [line for line in done.said.splitlines() if "best_state_dict.pt" in line]
    assert len(lines) == 1
    assert "the seeds' form holds low-rank scales, this student has groups" in lines[0]
    assert not list(folder.glob("*.pt"))
    assert "mlp_lut_bits" not in read_json(folder / "config.json")


def test_a_run_on_a_file_of_the_seeds_leaves_such_files(run, flags, tmp_path):
    """Best, last and last in float16 under their names, the same weights as the native folders."""
    start = make_v2(tmp_path).write(tmp_path / "start")
    cache = tiny_cache(tmp_path / "cache", tiny_qwen3())
    folder = tmp_path / "run"
    given = {**flags, "checkpoint": start, "cache_dir": cache, "output_dir": folder}
    done = run("train", **given)
    assert done.code == 0, done.said
    best, half, single = sorted(file.name for file in folder.glob("*.pt"))
    assert best == "best_state_dict.pt"
    assert re.fullmatch(r"v2_q2a4_r6_fp16_\d{8}_\d{6}\.pt", half)
    assert re.fullmatch(r"v2_q2a4_r6_fp32_\d{8}_\d{6}\.pt", single)
    for name, native, tolerance in (
        (best, "best", 2e-6),
        (single, "final", 2e-6),
        (half, "final", 2e-3),
    ):
        expected = weights_of(folder / native)
        student, _ = load_model(folder / name)
        for layer, weight in expected.items():
            found = student.get_submodule(layer).fake_quantized_weight()
            assert (found - weight).abs().max() <= tolerance * weight.abs().max(), (name, layer)
    numbers = [v for v in torch.load(folder / half).values() if v.is_floating_point()]
    assert all(torch.equal(values.half().float(), values) for values in numbers)
    config = read_json(folder / "config.json")
    assert config["version"] == "v2"
    assert (config["mlp_lut_bits"], config["mlp_scale_rank"], config["attn_scale_rank"]) == (
        2,
        6,
        3,
    )
    again = run("train", **given)
    assert again.closing == done.closing
    assert len(list(folder.glob("*.pt"))) == 3


def test_a_finished_run_is_found(trained, run, flags):
    """Asked for again it takes no step and gives the same line."""
    folder, done = trained
    before = (folder / "metrics.jsonl").read_bytes()
    again = run("train", output_dir=folder, **OFTEN, **flags)
    assert again.closing == done.closing
    assert "is already complete: nothing to do" in again.said
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_is_the_same_every_time(trained, run, flags, tmp_path):
    """Same rows, same bytes of both students, whatever lies at other places."""
    done = run(
        "train", output_dir=tmp_path / "again", **{**OFTEN, **flags, "intervals.save_steps": 0}
    )
    assert done.code == 0
    assert rows_of(tmp_path / "again") == rows_of(trained[0])
    for name in ("best", "final"):
        assert (
            read_header(tmp_path / "again" / name).sha256 == read_header(trained[0] / name).sha256
        )


@pytest.mark.parametrize(
    "more",
    [
        {},
        {
            "accumulation_steps": 2,
            "optim.ema_decay": 0.5,
            "trainable": ("weights", "scales", "norms"),
        },
        {
            "gradient_checkpointing": True,
            "optim.schedule": "wsd",
            "trainable": ("auto", "codebooks"),
            "layers": "all",
        },
        {"loss.sampled_negatives": 16, "loss.hard_weight": 0.1},
    ],
)
def test_a_run_cut_short_ends_like_one_that_was_not(run, flags, tmp_path, monkeypatch, more):
    """Cut after the state of step 2: the same rows, the same bytes."""
    from qat.train import step

    flags = {**flags, **OFTEN, **more}
    assert run("train", output_dir=tmp_path / "straight", **flags).code == 0
    take = step.Trainer.step
    taken = []

    def stop_at_fourth(self, *arguments):
        taken.append(1)
        if len(taken) == 4:
            raise OSError("the machine went away")
        return take(self, *arguments)

    monkeypatch.setattr(step.Trainer, "step", stop_at_fourth)
    assert run("train", output_dir=tmp_path / "cut", **flags).code == 2
    monkeypatch.setattr(step.Trainer, "step", take)
    done = run("train", output_dir=tmp_path / "cut", **flags)
    assert done.code == 0, done.said
    assert "resuming from step 2" in done.said
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "straight")
    for name in ("best", "final"):
        sums = [read_header(tmp_path / run_name / name).sha256 for run_name in ("cut", "straight")]
        assert sums[0] == sums[1]


@pytest.mark.parametrize("content", ["hidden", "sampled"])
def test_every_kind_of_cache_trains(run, flags, path, tmp_path, content):
    """Hidden states and draws as well as top-k."""
    cache = tiny_cache(tmp_path, tiny_llama(), content=content)
    done = run("train", output_dir=tmp_path / "run", **{**flags, "cache_dir": cache})
    assert done.code == 0, done.said
    assert done.closing["final_loss"] > 0


def test_bfloat16_trains(run, flags, tmp_path):
    """Norms among what trains, which are float32 in a bfloat16 model."""
    more = {"dtype": "bf16", "device": "cpu", "trainable": ("weights", "scales", "norms")}
    done = run("train", output_dir=tmp_path / "run", **flags, **more)
    assert done.code == 0, done.said


def test_the_layer_by_layer_stage_comes_first(run, flags, tmp_path):
    """Cut short in it, the run resumes at the block it was at, and ends the same."""
    from qat.train import blockwise

    flags = {**flags, "layerwise.sequences": 8, "max_steps": 1}
    straight = run("train", output_dir=tmp_path / "straight", **flags)
    assert straight.code == 0, straight.said
    original = blockwise.train_block
    calls = []

    def stop_at_second(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("the machine went away")
        return original(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "train_block", stop_at_second)
        assert run("train", output_dir=tmp_path / "cut", **flags).code == 2
    cut = run("train", output_dir=tmp_path / "cut", **flags)
    assert cut.code == 0, cut.said
    sums = [read_header(tmp_path / name / "final").sha256 for name in ("cut", "straight")]
    assert sums[0] == sums[1]


def test_blocks_of_another_run_are_not_taken_up(run, refused, flags, tmp_path, monkeypatch):
    """A layer-by-layer stage that was cut short left blocks that any later run went on from."""
    from qat.train import blockwise

    flags = {**flags, "layerwise.sequences": 8, "max_steps": 1}
    original = blockwise.train_block
    calls = []

    def stop_at_second(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("the machine went away")
        return original(*arguments, **named)

    monkeypatch.setattr(blockwise, "train_block", stop_at_second)
    assert run("train", output_dir=tmp_path / "run", **flags).code == 2
    flags["layerwise.lr"] = 1e-5
    message = refused("train", output_dir=tmp_path / "run", **flags)
    assert "holds a run with layerwise.lr 0.0002, this one has 1e-05" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "no/such/student"}, "no folder no/such/student"),
        ({"cache_dir": "no/such/cache"}, "cache no/such/cache does not exist"),
        ({"trainable": ("magnitudes",)}, "--trainable magnitudes finds nothing"),
        ({"trainable": ("wheels",)}, "'wheels' for argument '--trainable'"),
        ({"curriculum": "64:0"}, "--curriculum reaches length 64, the cache has blocks of 16"),
        ({"max_steps": 0}, "--max-steps 0 must be 1 or more"),
        (
            {"loss.divergence": "reverse-kl", "loss.temperature": 2.0},
            "--temperature 2.0 needs every teacher logit",
        ),
    ],
)
def test_bad_input_is_one_line(refused, flags, tmp_path, changes, message):
    """What, and what to do."""
    assert message in refused("train", output_dir=tmp_path / "run", **{**flags, **changes})


def test_a_model_is_no_student(refused, flags, path, tmp_path):
    """With the command that makes one."""
    changed = {**flags, "checkpoint": path.teacher, "output_dir": tmp_path / "run"}
    assert "`qat init-student`" in refused("train", **changed)


def test_a_cache_of_another_teacher_or_tokenizer_is_refused(refused, flags, tmp_path):
    """The two fields that differ, before the run's folder is made."""
    changes = tiny_tokenizer()
    changes.add_tokens(["<|another|>"])
    for name, teacher, field in (
        ("a", tiny_llama(seed=5), "teacher_weights"),
        ("b", tiny_llama(hidden_size=32), "teacher_weights"),
    ):
        cache = tiny_cache(tmp_path / name, teacher)
        changed = {**flags, "cache_dir": cache, "output_dir": tmp_path / "run"}
        assert f"the cache has {field} " in refused("train", **changed)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["student", "model"])
def test_a_run_does_not_move_into_another_things_folder(refused, flags, path, tmp_path, kind):
    """The config.json of a student or a model was overwritten, and it never loaded again."""
    source = {"student": path.q2, "model": path.teacher}[kind]
    target = shutil.copytree(source, tmp_path / "target")
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    message = refused("train", output_dir=target, **flags)
    assert "a model or a student is there; choose another --output-dir" in message
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before


def test_a_run_of_other_settings_is_left_alone(refused, flags, trained):
    """The first setting that differs is named."""
    folder, _ = trained
    before = (folder / "config.json").read_bytes()
    changed = {**flags, "optim.lr": 1e-3, **OFTEN}
    assert "holds a run with optim.lr 0.0002, this one has 0.001" in refused(
        "train", output_dir=folder, **changed
    )
    assert (folder / "config.json").read_bytes() == before


@pytest.mark.parametrize("limit", [500, 30_000, 100_000])
def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_later(
    run, refused, flags, trained, tmp_path, limit
):
    """Whatever no longer fits, student or state: with space again the end is the same."""
    flags = {**flags, **OFTEN}
    with files_of_at_most(limit):
        message = refused("train", output_dir=tmp_path / "run", **flags)
    assert "free some space" in message
    done = run("train", output_dir=tmp_path / "run", **flags)
    assert done.code == 0, done.said
    assert rows_of(tmp_path / "run") == rows_of(trained[0])
    assert (
        read_header(tmp_path / "run" / "final").sha256 == read_header(trained[0] / "final").sha256
    )


def test_a_run_that_breaks_out_ends_in_one_line(refused, flags, tmp_path):
    """A rate far too high: the step is named, no student of NaN is kept."""
    changed = {**flags, **DIVERGING}
    message = refused("train", output_dir=tmp_path / "run", **changed)
    assert "at step" in message
    read_checkpoint(tmp_path / "run" / "best")


@pytest.mark.recipe
@pytest.mark.parametrize(("on_nan", "times"), [("stop", 0), ("rollback", 3)])
def test_a_rate_that_nothing_mends_ends_the_run(run, flags, tmp_path, on_nan, times):
    """At once, or after three times back to the last state; the best student loads either way."""
    changed = {**flags, **DIVERGING}
    done = run(
        "train",
        output_dir=tmp_path / "run",
        **{"intervals.save_steps": 1, "optim.on_nan": on_nan},
        **changed,
    )
    assert done.code == 2
    assert done.lines == []
    assert re.search(r"error: loss is \S+ at step 2, it was \S+", done.said.splitlines()[-1])
    assert done.said.count("back to step 1 at half the rate") == times
    read_checkpoint(tmp_path / "run" / "best")


def test_a_damaged_state_says_how_to_start_over(run, refused, flags, trained, tmp_path):
    """It is not trained on, and nothing else is lost."""
    folder = shutil.copytree(trained[0], tmp_path / "run")
    (folder / "summary.json").unlink()
    (state,) = (folder / "state").glob("step_0000004/*.distcp")
    state.write_bytes(state.read_bytes()[:-5])
    flags = {**flags, **OFTEN}
    message = refused("train", output_dir=folder, **flags)
    assert "does not match its sha256; remove" in message
    read_checkpoint(folder / "best")
    shutil.rmtree(folder / "state")
    assert run("train", output_dir=folder, **flags).code == 0


def test_a_student_whose_base_model_is_gone_still_trains(run, flags, path, tmp_path):
    """Latent weights then start at the student's own values."""
    student = shutil.copytree(path.q2, tmp_path / "q2")
    values = read_json(student / "checkpoint.json")
    values["base_model"]["path"] = "no/such/model"
    write_json(student / "checkpoint.json", values)
    done = run("train", **{**flags, "checkpoint": student, "output_dir": tmp_path / "run"})
    assert done.code == 0, done.said
    lines = [line for line in done.said.splitlines() if "no full-precision weights" in line]
    assert len(lines) == 1
    assert "no folder no/such/model" in lines[0]
    assert "give the model that it was made from with --model-id" in lines[0]
    start = read_json(tmp_path / "run" / "config.json")["latent_start"]
    assert start.startswith("quantized values: no folder no/such/model")
    given = {**flags, "checkpoint": student, "model_id": path.teacher}
    done = run("train", **given, output_dir=tmp_path / "given")
    assert "no full-precision weights" not in done.said
    start = read_json(tmp_path / "given" / "config.json")["latent_start"]
    assert start == "full-precision weights"


def test_results_are_copied_where_asked(run, flags, trained, tmp_path):
    """Onto a mounted drive, also from a run that had ended before."""
    folder, _ = trained
    more = {**OFTEN, "tracking.copy_to": tmp_path / "drive"}
    assert run("train", output_dir=folder, **flags, **more).code == 0
    copied = tmp_path / "drive"
    assert json.loads((copied / "summary.json").read_text())["steps"] == 4
    read_checkpoint(copied / "best")
    assert not (copied / "state").exists()


def test_another_cache_measures_when_named(run, flags, path, trained, tmp_path):
    """Numbers of a run are those of the named cache; what it learns from stays the same."""
    other = tiny_cache(tmp_path, tiny_llama(), seed=5, heldout_ratio=0, num_sequences=4)
    done = run(
        "train",
        output_dir=tmp_path / "run",
        eval_cache_dir=other,
        **{"intervals.eval_steps": 2},
        **flags,
    )
    assert done.code == 0, done.said
    alone = run("evaluate", checkpoint=tmp_path / "run" / "final", cache_dir=other)
    assert rows_of(tmp_path / "run")[-1]["eval/kl_nats_lower"] == alone.closing["kl_nats_lower"]
    losses = [row["train/loss"] for row in rows_of(tmp_path / "run") if "train/loss" in row]
    assert losses == [row["train/loss"] for row in rows_of(trained[0]) if "train/loss" in row]


def test_a_config_reproduces_its_run(run, trained, tmp_path):
    """The record is the whole run; flags win over it; the same rows and bytes come out."""
    folder, _ = trained
    again = run("train", config=folder / "config.json", output_dir=tmp_path / "again")
    assert again.code == 0, again.said
    assert rows_of(tmp_path / "again") == rows_of(folder)
    for name in ("best", "final"):
        sums = [read_header(one / name).sha256 for one in (folder, tmp_path / "again")]
        assert sums[0] == sums[1]
    records = [read_config(one)[SETTINGS] for one in (folder, tmp_path / "again")]
    assert records[1] == {**records[0], "output_dir": str(tmp_path / "again")}
    changed = {"config": folder / "config.json", "output_dir": tmp_path / "short", "max_steps": 1}
    assert run("train", **changed, **{"optim.lr": 1e-5}).closing["steps"] == 1
    settings = read_config(tmp_path / "short")[SETTINGS]
    assert settings["optim"] == {**records[0]["optim"], "lr": 1e-5}
    assert settings["layers"] == "mlp"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["optim"].update(speed=1), "optim.speed is not one of lr, "),
        (lambda config: config.update(v2_checkpoint="x"), "v2_checkpoint is not one of dtype, "),
        (lambda config: config.update(max_steps=0), "--max-steps 0 must be 1 or more"),
        (lambda config: config.pop("cache_dir"), "cache_dir is missing"),
    ],
)
def test_a_config_of_other_keys_is_refused(refused, trained, tmp_path, change, message):
    """One line names the file, the key and what there is."""
    record = read_json(trained[0] / "config.json")
    change(record["config"])
    write_json(tmp_path / "config.json", record)
    line = refused("train", config=tmp_path / "config.json", output_dir=tmp_path / "run")
    assert line.startswith(f"error: --config {tmp_path / 'config.json'}: ")
    assert message in line


def test_a_config_that_is_not_there_is_refused(refused):
    """With what to give."""
    assert "--config no/such.json is no file; give RUN/config.json" in refused(
        "train", config="no/such.json"
    )


def test_a_folder_belongs_to_one_process_at_a_time(refused, flags, tmp_path):
    """Two processes wrote into one run's folder, each over the other's state."""
    from qat.storage.files import folder_lock

    with folder_lock(tmp_path / "run"):
        assert "is in use by" in refused("train", output_dir=tmp_path / "run", **flags)
    assert not (tmp_path / "run").exists()


def test_dropout_is_in_steps_only_and_resumes_as_it_was(run, flags, path, tmp_path, monkeypatch):
    """Evaluation sees the whole model; a resumed run draws what the uncut one would have drawn."""
    from qat.train import step

    student = shutil.copytree(path.q2, tmp_path / "q2")
    config = read_json(student / "config.json")
    write_json(student / "config.json", {**config, "attention_dropout": 0.5})
    flags = {**flags, "checkpoint": student, **OFTEN, "gradient_checkpointing": True}
    take, taken = step.Trainer.step, []

    def stop_at_fourth(self, *arguments):
        taken.append(1)
        if len(taken) == 4:
            raise OSError("the machine went away")
        return take(self, *arguments)

    torch.manual_seed(5)
    assert run("train", output_dir=tmp_path / "straight", **flags).code == 0
    monkeypatch.setattr(step.Trainer, "step", stop_at_fourth)
    assert run("train", output_dir=tmp_path / "cut", **flags).code == 2
    monkeypatch.setattr(step.Trainer, "step", take)
    torch.manual_seed(99)
    assert run("train", output_dir=tmp_path / "cut", **flags).code == 0
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "straight")
    last = rows_of(tmp_path / "straight")[-1]
    final = tmp_path / "straight" / "final"
    alone = run("evaluate", checkpoint=final, cache_dir=flags["cache_dir"])
    assert last["eval/kl_nats_lower"] == pytest.approx(alone.closing["kl_nats_lower"], rel=1e-6)


def test_a_student_of_the_seeds_needs_no_tokenizer(run, flags, tmp_path):
    """`qat evaluate` took one where the cache names no tokenizer, training refused it."""
    start = make_v2(tmp_path).write(tmp_path / "start")
    for file in (tmp_path / "base").glob("*token*"):
        file.unlink()
    logits = torch.randn(12, 15, 272, generator=torch.Generator().manual_seed(0))
    shard = {
        "input_ids": torch.randint(261, (12, 16), dtype=torch.int32),
        "attention_mask": torch.ones(12, 16, dtype=torch.uint8),
        "topk_idx": logits.topk(8).indices.int(),
        "topk_logits": logits.topk(8).values.half(),
    }
    cache = tmp_path / "cache"
    cache.mkdir()
    torch.save(shard, cache / "shard_00000.pt")
    write_json(cache / "meta.json", {"vocab_size": 272, "teacher_model": "tiny"})
    assert run("evaluate", checkpoint=start, cache_dir=cache).code == 0
    given = {**flags, "checkpoint": start, "cache_dir": cache, "output_dir": tmp_path / "run"}
    done = run("train", **given)
    assert done.code == 0, done.said


def test_float16_trains(run, flags, tmp_path):
    """With a loss scale, which its state holds."""
    more = {"dtype": "fp16", "device": "cpu", **OFTEN}
    done = run("train", output_dir=tmp_path / "run", **{**flags, **more})
    assert done.code == 0, done.said
