"""Generation in batches gives what one prompt at a time gives; a file of answers is never half."""

import json

import pytest
import torch

from qat.cli.commands import main
from qat.evaluate.generate import (
    Decoding,
    answer_file,
    generate_texts,
    pad_left,
    prompt_of,
    prompt_token_ids,
)
from qat.evaluate.generate_config import GenerateConfig
from tests.tiny import TINY_MODELS, save_tiny, tiny_llama, tiny_tokenizer, write_jsonl

PROMPTS = ["a", "four birds", "the red boat and the sea", "x y"]


def greedy_by_hand(model, token_ids, num_tokens):
    """Return the likeliest continuation by whole forwards, without padding, cache or batch."""
    ids, new = list(token_ids), []
    for _ in range(num_tokens):
        new.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        ids.append(new[-1])
        if new[-1] == model.config.eos_token_id:
            break
    return new


@pytest.mark.recipe
@pytest.mark.parametrize("family", TINY_MODELS)
@pytest.mark.parametrize("template", ["chat", "none"])
def test_a_batch_answers_as_single_prompts_do(family, template):
    """Left padding is invisible: greedy answers equal those made by hand, in prompt order."""
    model, tokenizer = TINY_MODELS[family](), tiny_tokenizer()
    decoding = Decoding(max_new_tokens=6, batch_size=3, template=template)
    answers = dict(generate_texts(model, tokenizer, PROMPTS, decoding))
    for position, prompt in enumerate(PROMPTS):
        token_ids = prompt_token_ids(tokenizer, prompt, template)
        by_hand = greedy_by_hand(model, token_ids, 6)
        assert answers[position] == tokenizer.decode(by_hand, skip_special_tokens=True).strip()


def test_sampling_follows_the_seed():
    """Equal seeds give equal samples, another seed another."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    decoding = Decoding(max_new_tokens=12, temperature=1.0)
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(dict(generate_texts(model, tokenizer, PROMPTS, decoding)))
    assert samples[0] == samples[1] != samples[2]


def test_the_template_opens_the_answer_where_there_is_one():
    """With a template the prompt becomes a turn; without one, or with none asked, it is bare."""
    templated = tiny_tokenizer().decode(prompt_token_ids(tiny_tokenizer(), "hello", "chat"))
    assert templated == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    bare = tiny_tokenizer(chat_template=None)
    assert bare.decode(prompt_token_ids(bare, "hello", "chat")) == "hello"
    assert bare.decode(prompt_token_ids(tiny_tokenizer(), "hello", "none")) == "hello"


def test_padding_is_on_the_left_and_masked():
    """Every prompt ends in the last column."""
    input_ids, attention_mask = pad_left([[5, 6, 7], [8]], 0)
    assert input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_prompt_beyond_the_context_is_refused_before_work():
    """The message counts the tokens and names the flag."""
    with pytest.raises(ValueError, match=r"300 tokens.*context of 256.*--max-new-tokens"):
        next(generate_texts(tiny_llama(), tiny_tokenizer(), ["a" * 300], Decoding(template="none")))


def rows_with_gap():
    return [
        {"instruction": "one", "input": "", "output": "kept"},
        {"instruction": "two", "input": "with input", "output": ""},
        {"instruction": "three", "output": ""},
        {"instruction": "four", "input": ""},
    ]


def shout(prompts):
    """Answer in another order than asked."""
    for position in reversed(range(len(prompts))):
        yield position, prompts[position].upper()


def outputs(path):
    return [json.loads(line)["output"] for line in path.read_text().splitlines()]


def test_empty_rows_are_answered_and_full_ones_kept(tmp_path):
    """Answers land in their own rows; the instruction and its input are one prompt."""
    data = write_jsonl(tmp_path / "data.jsonl", rows_with_gap())
    counts = answer_file(data, tmp_path / "out.jsonl", shout, settings={})
    assert outputs(tmp_path / "out.jsonl") == ["kept", "TWO\n\nWITH INPUT", "THREE", "FOUR"]
    assert counts == {"rows": 4, "answered": 3, "kept": 1, "resumed": 0}
    assert prompt_of(rows_with_gap()[2]) == "three"


def test_a_file_can_be_answered_in_place(tmp_path):
    """With overwriting every row is answered anew, in the data file itself."""
    data = write_jsonl(tmp_path / "data.jsonl", rows_with_gap())
    answer_file(data, data, shout, settings={}, overwrite_outputs=True)
    assert outputs(data)[0] == "ONE"
    names = [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"]
    assert names == ["data.jsonl"]


def interrupt_after(count):
    """Return a way to answer that stops, as an interruption does, after some answers."""

    def answer(prompts):
        for done, pair in enumerate(shout(prompts)):
            if done == count:
                raise KeyboardInterrupt
            yield pair

    return answer


def test_an_interrupted_file_is_continued(tmp_path):
    """The output appears only when whole; what was answered, but for a torn line, is not redone."""
    data, out = write_jsonl(tmp_path / "data.jsonl", rows_with_gap()), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_file(data, out, interrupt_after(2), settings={"seed": 0})
    assert not out.exists()
    part = tmp_path / "out.part.jsonl"
    part.write_text(part.read_text()[:-5])  # tears the second answer
    asked = []

    def answer(prompts):
        asked.extend(prompts)
        return shout(prompts)

    counts = answer_file(data, out, answer, settings={"seed": 0})
    assert asked == ["two\n\nwith input", "three"]
    assert counts["resumed"] == 1
    assert outputs(out) == ["kept", "TWO\n\nWITH INPUT", "THREE", "FOUR"]
    assert not part.exists()


def test_a_part_file_of_other_settings_is_refused(tmp_path):
    """Answers of two models never mix."""
    data, out = write_jsonl(tmp_path / "data.jsonl", rows_with_gap()), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_file(data, out, interrupt_after(1), settings={"checkpoint": "a"})
    with pytest.raises(ValueError, match="begun for other rows or settings"):
        answer_file(data, out, shout, settings={"checkpoint": "b"})


@pytest.mark.recipe
def test_two_processes_do_not_answer_into_one_file(tmp_path):
    """The second is told; the first goes on."""
    data, out = write_jsonl(tmp_path / "data.jsonl", rows_with_gap()), tmp_path / "out.jsonl"

    def answer(prompts):
        with pytest.raises(ValueError, match=r"out\.jsonl is in use by process \d+"):
            answer_file(data, out, shout, settings={})
        return shout(prompts)

    assert answer_file(data, out, answer, settings={})["answered"] > 0


def test_an_output_that_exists_is_refused(tmp_path):
    """Nobody's file is replaced, but for the data file when asked."""
    data, out = write_jsonl(tmp_path / "data.jsonl", rows_with_gap()), tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(ValueError, match="exists; remove it"):
        answer_file(data, out, shout, settings={})
    assert out.read_text() == "mine"


@pytest.mark.parametrize("text", ["", '{"output": "x"}\n', "not json\n"])
def test_data_of_another_kind_is_refused(tmp_path, text):
    """An empty file, a row without instruction and a line that is no JSON each say so."""
    data = tmp_path / "data.jsonl"
    data.write_text(text)
    with pytest.raises(ValueError, match=r"data\.jsonl"):
        answer_file(data, tmp_path / "out.jsonl", shout, settings={})


def test_contradicting_flags_are_refused():
    """Prompts or data, not both and not neither; data only with an output."""
    for flags in ({}, {"prompt": ("a",), "data": "x", "output": "y"}, {"data": "x"}):
        with pytest.raises(ValueError, match="--data"):
            GenerateConfig(checkpoint="c", **flags)


def test_the_command_answers_prompts_and_files(tmp_path, capsys):
    """The closing line holds the answers, or where they are."""
    folder = save_tiny(tmp_path / "model", tiny_llama())
    flags = ["--checkpoint", str(folder), "--device", "cpu", "--dtype", "fp32"]
    flags += ["--max-new-tokens", "4"]
    assert main("generate", [*flags, "--prompt", "a cat", "a boat"]) == 0
    closing = json.loads(capsys.readouterr().out)
    assert [pair["prompt"] for pair in closing["answers"]] == ["a cat", "a boat"]
    data, out = write_jsonl(tmp_path / "data.jsonl", rows_with_gap()), tmp_path / "out.jsonl"
    assert main("generate", [*flags, "--data", str(data), "--output", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["answered"] == 3
    assert outputs(out)[0] == "kept"
