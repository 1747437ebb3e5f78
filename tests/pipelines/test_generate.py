"""The Python API of generation."""

import json

from qat.evaluate.generate_config import GenerateConfig
from qat.pipelines.generate import generate
from tests.tiny import save_tiny, tiny_llama, write_jsonl


def test_prompts_and_files_get_the_same_answers(tmp_path):
    """Answers come in the result; those of a file are in the file, and counted."""
    folder = save_tiny(tmp_path / "model", tiny_llama())
    settings = {"checkpoint": str(folder), "device": "cpu", "dtype": "fp32", "max_new_tokens": 4}
    texts = ("a cat", "a boat")
    found = generate(GenerateConfig(prompt=texts, **settings))
    assert [pair["prompt"] for pair in found.answers] == list(texts)
    assert found.output is found.rows is None
    data = write_jsonl(tmp_path / "data.jsonl", [{"instruction": text} for text in texts])
    output = tmp_path / "out.jsonl"
    made = generate(GenerateConfig(data=data, output=output, **settings))
    assert (made.answers, made.output, made.rows, made.answered) == (None, str(output), 2, 2)
    written = [json.loads(line)["output"] for line in output.read_text().splitlines()]
    assert written == [pair["answer"] for pair in found.answers]
