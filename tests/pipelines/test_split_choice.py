import logging
from dataclasses import replace

import pytest

from qat.cache.read import TeacherCache
from qat.pipelines.open_checkpoint import open_checkpoint
from qat.pipelines.place import Place
from qat.pipelines.split_choice import needs_split
from qat.runtime.config import PlaceConfig
from qat.runtime.device import Device
from qat.train.config import OptimConfig, TrainConfig
from tests.tiny import quantize_plainly, save_student, tiny_cache, tiny_llama

GIB = 2**30
PLACE = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache, and students in a format that rows can be split of and in one that they cannot."""
    folder = tmp_path_factory.mktemp("made")
    model = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    cache = tiny_cache(folder, tiny_llama(**model))
    for plan in ("q2a4", "gguf:i2_s"):
        name = plan.replace(":", "_")
        student = quantize_plainly(tiny_llama(**model), plan)
        save_student(folder / name, student, folder / "teacher", plan=plan)
    return folder, TeacherCache.open(cache)


@pytest.fixture
def choose(made, monkeypatch, caplog):
    """Ask in one of four processes on a machine of so many bytes; return answer and messages."""
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.INFO, logger="qat")

    def ask(total, plan="q2a4", dtype="fp32", **changes):
        monkeypatch.setattr(Device, "total_bytes", lambda _device: total)
        folder, cache = made
        checkpoint = folder / plan.replace(":", "_")
        config = TrainConfig(checkpoint=checkpoint, cache_dir=folder, output_dir=folder / "r")
        config = replace(config, **changes)
        place = Place.of(PlaceConfig(device="cpu", dtype=dtype))
        caplog.clear()
        return needs_split(config, open_checkpoint(checkpoint), cache, place), caplog.text

    return ask


def test_rows_are_chosen_where_copies_do_not_fit(choose):
    """The processes of a machine share its memory; the line says what was predicted."""
    assert not choose(64 * GIB)[0]
    chosen, said = choose(GIB)
    assert chosen
    assert "--shard chosen: by prediction a process with a copy" in said
    assert "has 0.25" in said


def test_what_was_asked_for_stays(choose):
    """Also where copies would fit."""
    assert choose(64 * GIB, shard=True)[0]


def test_rows_are_not_chosen_where_they_cannot_be_had(choose, monkeypatch):
    """One process, loss scales of float16, averages of 8 bits, one scale for all rows."""
    assert not choose(GIB, dtype="fp16")[0]
    assert not choose(GIB, optim=OptimConfig(averages="8bit"))[0]
    assert not choose(GIB, form_weights="in-use", gradient_checkpointing=True)[0]
    assert not choose(GIB, plan="gguf:i2_s")[0]
    monkeypatch.delenv("RANK")
    assert not choose(GIB)[0]
