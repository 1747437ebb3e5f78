"""The card says what is known of a student, and how to load what was exported."""

from dataclasses import replace
from pathlib import Path

import pytest

from qat.model.checkpoint import CheckpointHeader
from qat.reports.model_card import LOADING, write_card
from qat.storage.files import write_json
from tests.tiny import plan_of, tiny_llama

HEADER = CheckpointHeader(
    plan=plan_of(tiny_llama(), "deploy").to_dict(),
    base_model={"name": "tiny-135M", "path": "models/tiny"},
    cache_fingerprint="0123456789abcdef",
    metrics={"kl_nats": 0.51234, "perplexity": 21.5},
)
REPORT = {"tensors_compared": 9, "file_bytes": 4711, "bits_per_weight": 2.8125}


def card(tmp_path, to, header=HEADER, report=REPORT, **flags):
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    write_json(run / "summary.json", {"tokens_seen": 32768, "seconds": 221.5})
    output = tmp_path / flags.pop("name", "student-2bit")
    if not output.suffix:
        output.mkdir()
    dtype = flags.get("dtype")
    return write_card(report, header, run / "best", target=to, dtype=dtype, output=output)


@pytest.mark.parametrize("to", LOADING)
def test_every_format_has_a_card(tmp_path, to):
    """Base model, plan, bits, closeness, training, cache, and its own way of loading."""
    path = card(tmp_path, to)
    text = path.read_text()
    assert path == tmp_path / "student-2bit" / "README.md"
    for value in ("tiny-135M", "deploy", "2.812", "0.5123", "21.5", "32768", "0123456789abcdef"):
        assert value in text
    assert text.startswith("---\nbase_model: tiny-135M\nbase_model_relation: quantized\n")
    assert "student-2bit" in text
    assert "PATH" not in text
    assert ("import qat.export.plugin" in text) == (to == "hf-quantized")


def test_a_single_file_has_its_card_beside_it(tmp_path):
    """Under its own name: a README.md there may be somebody's."""
    path = card(tmp_path, "gguf", name="a.gguf")
    assert path == tmp_path / "a.md"
    assert "llama-cli -m a.gguf" in path.read_text()


def test_what_is_not_known_is_left_out(tmp_path):
    """A dense reference of a full-precision model has no plan and no cache."""
    text = Path(card(tmp_path, "gguf", header=None, dtype="fp16")).read_text()
    assert "None" not in text
    assert "Dense weights in fp16" in text
    assert "plan" not in text


def test_a_bound_is_called_one(tmp_path):
    """A lower bound of the KL does not stand under the exact number's name."""
    header = replace(HEADER, metrics={"kl_nats": None, "kl_nats_lower": 0.25})
    lines = Path(card(tmp_path, "gguf", header=header)).read_text().splitlines()
    assert [line for line in lines if "KL to" in line] == [
        "| KL to the teacher, held out, lower bound (nats) | 0.25 |"
    ]
