"""Files of a model that was made from text: a runtime answers as PyTorch does."""

import runpy

import pytest

from tests.parity.test_runtimes import need
from tests.recipes.test_milestone import SCRIPT, config_of
from tests.tiny import quick_fits

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("kind", ["sentencepiece-bpe", "sentencepiece-unigram", "byte-level-bpe"])
def test_a_new_model_answers_in_llama_cpp(tmp_path, kind):
    """Greedy and sampled tokens of the f16 file are equal, the others near."""
    need("xllamacpp", "xllamacpp")
    script = runpy.run_path(str(SCRIPT))
    with quick_fits():
        rows = script["run_milestone"](config_of(script, tmp_path, kind=kind))["files"]
    assert all(row["runtime"].startswith("llama.cpp") for row in rows)
    assert rows[0]["same_answers"] == rows[0]["same_samples"] == 1
    assert rows[0]["runtime_kl_nats"] < 1e-5
    assert all(row["runtime_kl_nats"] < 1e-3 for row in rows)
