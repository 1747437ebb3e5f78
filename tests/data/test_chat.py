import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.data.chat import (
    apply_template,
    detect_format,
    ignores_thinking,
    plain_texts,
    render,
    turn,
    turns_of,
)
from qat.data.config import TextConfig
from qat.data.text import read_documents
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer, write_jsonl

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
# As Qwen3's: earlier turns lose their thoughts, the last one gets an empty span.
REWRITING_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last and message['role'] == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Yes."}),
        ("dolly", {"instruction": "Hi", "context": "", "response": "Yes."}),
        ("messages", {"messages": TURNS}),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                    TURNS[1],
                ]
            },
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]},
        ),
    ],
)
def test_every_format_is_found_and_gives_the_same_turns(kind, record):
    """One conversation written in each format is one conversation."""
    assert detect_format(record) == kind
    assert turns_of(record, kind) == TURNS


def test_alpaca_puts_the_input_after_a_blank_line():
    """The seeds' user turn: instruction, blank line, input."""
    record = {"instruction": "Add.", "input": "2 2", "output": "4"}
    assert turns_of(record, "alpaca")[0]["content"] == "Add.\n\n2 2"


def test_none_joins_contents_by_blank_lines():
    """thinking=none uses no template."""
    assert render(TURNS, tiny_tokenizer(None), "none") == "Hi\n\nYes."


def test_thinking_modes_render_as_the_seeds_do(tmp_path):
    """both is off then on; all is on, off, then without a template; off has no think span."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}])
    tokenizer = tiny_tokenizer(REWRITING_TEMPLATE)

    def texts(thinking):
        plan = TextConfig(seq_len=8, thinking=thinking)
        return [
            tokenizer.decode(item.token_ids) for item in read_documents(str(path), tokenizer, plan)
        ]

    off, on, plain = texts("false")[0], texts("true")[0], texts("none")[0]
    assert "<think>" in on
    assert "<think>" not in off
    assert plain == "Hi\n\nYes."
    assert texts("both") == [off, on]
    assert texts("all") == [on, off, plain]


def test_a_template_that_ignores_thinking_is_known_and_renders_once(tmp_path):
    """Two equal texts would only weigh a record twice."""
    plain = tiny_tokenizer(CHAT_TEMPLATE.replace("enable_thinking is false", "false"))
    assert ignores_thinking(plain)
    assert not ignores_thinking(tiny_tokenizer(REWRITING_TEMPLATE))
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}])
    plan = TextConfig(seq_len=8, thinking="both")
    assert len(list(read_documents(str(path), plain, plan))) == 1


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, REWRITING_TEMPLATE, None])
@pytest.mark.parametrize("thinking", ["none", "false", "true"])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_assistant_loss_counts_what_the_assistant_says(tmp_path_factory, template, thinking, data):
    """The counted tokens of a conversation hold every answer, and no question."""
    if template is None and thinking != "none":
        return
    texts = st.text("abc ", min_size=1, max_size=6).filter(str.strip)
    answers = data.draw(st.lists(texts, min_size=1, max_size=3))
    turns = []
    for answer in answers:
        turns += [{"role": "user", "content": "QQ"}, {"role": "assistant", "content": answer}]
    path = write_jsonl(tmp_path_factory.mktemp("data") / "a.jsonl", [{"messages": turns}])
    tokenizer = tiny_tokenizer(template)
    plan = TextConfig(seq_len=8, thinking=thinking, loss_on="assistant")
    (item,) = read_documents(str(path), tokenizer, plan)
    counted = tokenizer.decode(item.token_ids[item.is_counted])
    spoken = re.sub(r"<think>.*?</think>\s*|<\|im_end\|>|\n", "", counted, flags=re.DOTALL)
    assert spoken.replace(" ", "") == "".join(answers).replace(" ", "")


def test_thoughts_that_a_template_drops_do_not_hide_the_answer(tmp_path):
    """Without thinking, an answer with thoughts counts from behind them."""
    answer = {"role": "assistant", "content": "<think>Hm.</think>Yes."}
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [TURNS[0], answer]}])
    tokenizer = tiny_tokenizer()
    plan = TextConfig(seq_len=8, thinking="false", loss_on="assistant")
    (item,) = read_documents(str(path), tokenizer, plan)
    counted = tokenizer.decode(item.token_ids[item.is_counted])
    assert counted == "Yes.<|im_end|>\n"


def test_the_end_of_an_answer_counts_with_it(tmp_path):
    """A student must learn to stop: the turn's end token is the assistant's."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}])
    tokenizer = tiny_tokenizer()
    plan = TextConfig(seq_len=8, thinking="true", loss_on="assistant")
    (item,) = read_documents(str(path), tokenizer, plan)
    assert "Yes.<|im_end|>" in tokenizer.decode(item.token_ids[item.is_counted])


def test_a_sample_without_counted_tokens_is_refused_with_its_index(tmp_path):
    """The index says which sample to correct."""
    records = [{"messages": TURNS}, {"messages": TURNS[:1]}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    plan = TextConfig(seq_len=8, loss_on="assistant")
    with pytest.raises(ValueError, match="sample 1 "):
        list(read_documents(str(path), tiny_tokenizer(), plan))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for message in messages %}", "unexpected end|Unexpected end"),
        ("{{ messages[9].content.x }}", "no element 9|undefined|has no"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 9 ** 9 ** 9 }}", r"operator \*\*"),
        ("{{ raise_exception('two systems') }}", "two systems"),
    ],
)
def test_a_template_that_fails_is_named(template, said):
    """jinja's own words came out of a traceback; a power could fill the memory."""
    tokenizer = tiny_tokenizer(template)
    with pytest.raises(ValueError, match=rf"chat template of .* cannot be read \(.*({said})"):
        render([turn("user", "x")], tokenizer, "true")


def test_text_is_text():
    """A number or a list in the place of a text reached the joining of texts."""
    for content in (3, {"a": 1}, b"x"):
        with pytest.raises(ValueError, match="is no text"):
            turn("user", content)


def test_plain_text_is_a_column_or_what_a_format_joins():
    """A record without either is refused with its number and its fields."""
    records = [{"body": "a"}, {"body": None}, {"instruction": "b", "input": "", "output": "c"}]
    assert list(plain_texts(records, "body")) == ["a", "", "b\n\nc"]
    with pytest.raises(ValueError, match="record 1 has the fields title; give the one"):
        list(plain_texts([{"text": "a"}, {"title": "b"}], "text"))
    with pytest.raises(ValueError, match="record 0: text 3 is not text"):
        list(plain_texts([{"text": 3}], "text"))
    with pytest.raises(ValueError, match="record 0 looks like messages and is not"):
        list(plain_texts([{"messages": [{"said": "a"}]}], "text"))


def test_one_of_several_templates_by_name_is_used():
    """Each is looked at, quotes and line ends in it stay what they are."""
    tokenizer = tiny_tokenizer()
    turns = [{"role": "user", "content": "hello"}]
    plain = "{% for turn in messages %}{{ turn['content'] + '\n' }}{% endfor %}"
    tokenizer.chat_template = {"default": plain, "tool_use": "{{ 'tools' }}"}
    assert apply_template(tokenizer, turns) == "hello\n"
    tokenizer.chat_template = {"default": plain, "tool_use": "{{ 9 ** 9 }}"}
    with pytest.raises(ValueError, match=r"operator \*\*"):
        apply_template(tokenizer, turns)
