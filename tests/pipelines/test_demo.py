"""The whole of `qat demo`, on a tiny model in the place of the downloaded one."""

from dataclasses import replace

import pytest

from tests.tiny import save_tiny, tiny_llama, tiny_records, write_jsonl

pytestmark = pytest.mark.recipe


def test_the_demo_continues_where_it_stopped(tmp_path, monkeypatch, capsys):
    """Every file gets numbers and answers; a second call finds them all and makes nothing."""
    from qat.pipelines import demo
    from qat.pipelines.demo_config import DemoConfig

    def fetch(folder):
        if not folder.is_dir():
            save_tiny(folder, tiny_llama())

    monkeypatch.setattr(demo, "fetch_smollm2", fetch)
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "data.jsonl", tiny_records(200))
    config = DemoConfig(data="data.jsonl", sizes="90KB,60KB", minutes=0, stock="", max_new_tokens=3)
    first = demo.demo(config)
    teacher, large, small = first.files
    assert teacher.kl_nats == pytest.approx(0, abs=1e-4)
    assert teacher.kl_nats < large.kl_nats < small.kl_nats
    assert small.file_bytes <= 60_000 < large.file_bytes <= 90_000
    assert (tmp_path / "runs" / "demo" / "smollm2-60KB.gguf").stat().st_size == small.file_bytes
    assert all(len(file.answers) == len(demo.PROMPTS) for file in first.files)
    assert "What is the capital of Germany?" in capsys.readouterr().err
    monkeypatch.setattr(demo, "measure_model", None)
    again = demo.demo(config)
    assert replace(again, seconds=0, peak_rss_bytes=0) == replace(
        first, seconds=0, peak_rss_bytes=0
    )
