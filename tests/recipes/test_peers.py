"""The script that makes students by other programs, on the one that the parity tier installs."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from qat.model.load import load_dense
from tests.tiny import save_tiny, tiny_llama

SCRIPT = Path(__file__).parents[2] / "speedrun" / "peers.py"
GROUP = 32  # of two bits and a scale of 16: 2.5 bits a weight


@pytest.fixture
def script():
    """Return what the script defines."""
    return runpy.run_path(str(SCRIPT))


@pytest.mark.recipe
def test_no_program_gets_fewer_bits_than_a_row_says(script):
    """Nor a smaller group than it needs for them."""
    for peer in script["PEERS"].values():
        for parts in script["ROWS"].values():
            for code_bits, least in parts:
                group = peer.widest_group(code_bits, least)
                assert peer.bits(code_bits, group) >= least
                assert group == 128 or peer.bits(code_bits, 2 * group) < least


@pytest.fixture
def config(script, tmp_path):
    """Return the settings of a run over a tiny model."""
    save_tiny(tmp_path / "model", tiny_llama())
    text = tmp_path / "text.txt"
    text.write_text("what the tokens of a text are does not matter here. " * 40)
    named = {"model": str(tmp_path / "model"), "data": text, "eval_text": text}
    few = {"samples": 4, "batch_size": 4, "minutes": 0.02, "seq_len": 16, "eval_sequences": 4}
    peers = {"peers": ("torchao",), "rows": ("q2a4",)}
    return script["PeersConfig"](**named, **few, **peers, output_dir=tmp_path / "out")


@pytest.mark.parity
def test_a_student_of_another_program_lies_on_its_grid(script, config, monkeypatch):
    """Four values a group in the MLP, sixteen in attention, the rest as it was; made once."""
    pytest.importorskip("torchao")
    here = lambda *_: Path(sys.executable)  # noqa: E731  # which has torchao
    monkeypatch.setitem(script["compare_peers"].__globals__, "environment", here)
    table = script["compare_peers"](config)
    assert [(row["bits_mlp"], row["bits_attention"]) for row in table] == [(2.5, 4.5)]
    assert 0 < table[0]["kl_nats"] < table[0]["kl_p99"]
    student, teacher = load_dense(table[0]["student"]), load_dense(config.model)
    original = dict(teacher.named_parameters())
    for name, weight in student.named_parameters():
        if "_proj" in name:
            most = 16 if "self_attn" in name else 4
            groups = weight.detach().reshape(-1, GROUP)
            assert max(len(group.unique()) for group in groups) <= most
        else:
            assert torch.equal(weight, original[name])
    before = (Path(table[0]["student"]) / "model.safetensors").stat().st_mtime_ns
    assert script["compare_peers"](config) == table
    assert (Path(table[0]["student"]) / "model.safetensors").stat().st_mtime_ns == before
    described = config.output_dir / "students" / "torchao-q2a4" / "job.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"lr": 1.0}))
    with pytest.raises(ValueError, match="remove it"):
        script["compare_peers"](config)
