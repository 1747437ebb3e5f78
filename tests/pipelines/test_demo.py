"""The whole path of `qat demo`, on a tiny model in the place of the downloaded one."""

import pytest

from tests.tiny import save_tiny, tiny_llama, tiny_records, write_jsonl

pytestmark = pytest.mark.recipe


def test_the_demo_continues_where_it_stopped(tmp_path, monkeypatch, capsys):
    """Every stage gives its numbers; a second call finds them all and makes nothing."""
    from qat.pipelines import demo
    from qat.pipelines.demo_config import DemoConfig

    def fetch(folder):
        if not folder.is_dir():
            save_tiny(folder, tiny_llama())

    monkeypatch.setattr(demo, "fetch_smollm2", fetch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "speedrun" / "data").mkdir(parents=True)
    write_jsonl(tmp_path / demo.DATA, tiny_records(200))
    first = demo.demo(DemoConfig(max_steps=2))
    assert first.teacher["bits_per_weight"] is None
    assert first.q4["kd_loss"] < first.q2_init["kd_loss"]
    assert first.q2_trained["bits_per_weight_mlp"] == first.q2_init["bits_per_weight_mlp"] < 2.6
    assert (tmp_path / "runs" / "demo" / "hf" / "model.safetensors").is_file()
    assert "What is the capital of Germany?" in capsys.readouterr().err
    again = demo.demo(DemoConfig(max_steps=2))
    assert (again.q4, again.q2_trained) == (first.q4, first.q2_trained)
