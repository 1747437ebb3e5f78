"""The size of a GGUF file is known from a plan, before there is a student."""

import pytest

from qat.export.gguf_size import planned_file_bytes
from qat.export.to_gguf import export_to_gguf
from tests.tiny import TINY_MODELS, plan_of, save_tiny, tiny_student


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_planned_size_is_that_of_the_file(tmp_path, family, tied):
    """To the byte, header and tokenizer included."""
    plan = "all=gguf:q4_1, mlp=gguf:q4_0, embed=gguf:q8_0"
    model = TINY_MODELS[family](tied=tied)
    folder = save_tiny(tmp_path / "m", model)
    export_to_gguf(tiny_student(family, plan, tied=tied), tmp_path / "a.gguf", text_source=folder)
    planned = planned_file_bytes(model.config, plan_of(model, plan), text_source=folder)
    assert planned == (tmp_path / "a.gguf").stat().st_size
