from dataclasses import replace

import pytest
import torch

from qat.data.text import bos_id
from qat.evaluate.config import EvaluateConfig
from qat.evaluate.windows import cut_windows, perplexity_of_windows
from qat.model.load import load_dense
from qat.pipelines.evaluate import evaluate
from qat.pipelines.perplexity import named_source, read_domains
from qat.runtime.config import split_list
from tests.tiny import (
    save_student,
    save_tiny,
    tiny_llama,
    tiny_records,
    tiny_student,
    tiny_tokenizer,
    with_bos,
    write_jsonl,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its student, and two texts."""
    folder = tmp_path_factory.mktemp("perplexity")
    save_tiny(folder / "model", tiny_llama())
    save_student(folder / "student", tiny_student(), folder / "model")
    write_jsonl(folder / "words.jsonl", tiny_records(8))
    (folder / "more.txt").write_text("two small birds near the old boat. " * 9)
    return folder


def config_for(folder, **changes):
    usual = {"window": 32, "stride": 8, "device": "cpu", "dtype": "fp32"}
    sources = (f"english={folder / 'words.jsonl'}", str(folder / "more.txt"))
    settings = {"checkpoint": str(folder / "model"), "perplexity": sources}
    return EvaluateConfig(**{**usual, **settings, **changes})


def test_each_text_is_a_domain_with_its_own_number(folder):
    """That of its tokens in windows; the convention is a part of the result."""
    result = evaluate(config_for(folder))
    assert list(result.domains) == ["english", "more"]
    assert (result.window, result.stride, result.bos, result.joined_by) == (32, 8, False, "\n\n")
    text = (folder / "more.txt").read_text()
    ids = torch.tensor(tiny_tokenizer()(text).input_ids)
    windows = cut_windows(ids, 32, 8, None)
    expected = perplexity_of_windows(
        load_dense(folder / "model"), *windows, device=torch.device("cpu")
    )
    assert result.domains["more"] == expected
    assert expected["tokens"] == len(ids) - 1


def test_a_student_is_measured_too(folder):
    """With its bits; it is further from the text than its teacher, which was trained on nothing."""
    student = evaluate(config_for(folder, checkpoint=str(folder / "student")))
    dense = evaluate(config_for(folder))
    assert student.bits_per_weight < 5
    assert dense.bits_per_weight is None
    assert student.domains["more"]["perplexity"] != dense.domains["more"]["perplexity"]
    assert student.domains["more"]["tokens"] == dense.domains["more"]["tokens"]


def test_windows_start_with_bos_where_the_tokenizer_puts_it(folder):
    """It takes a place of each."""
    tokenizer = with_bos(tiny_tokenizer())
    (domain,) = read_domains((str(folder / "more.txt"),), tokenizer, window=16, stride=4)
    assert (domain.ids[:, 0] == bos_id(tokenizer)).all()
    assert domain.ids.shape[1] == 16


def test_commas_part_texts_as_spaces_do(folder):
    """But not the parts of a path, which stays whole."""
    more, words = str(folder / "more.txt"), str(folder / "words.jsonl")
    comma = folder / "one,two.txt"
    comma.write_text("two small birds")
    assert split_list((f"a={more},{words}", f"b={comma}")) == (f"a={more}", words, f"b={comma}")
    found = read_domains((f"a={more},{words}",), tiny_tokenizer(), window=16, stride=4)
    assert [domain.name for domain in found] == ["a", "words"]


def test_names_are_given_or_those_of_files(folder):
    """A path that holds `=` is a path."""
    odd = folder / "a=b.txt"
    odd.write_text("x")
    assert named_source(str(odd)) == ("a=b", str(odd))
    assert named_source("math=x.parquet") == ("math", "x.parquet")
    twice = (str(folder / "more.txt"), f"more={folder / 'words.jsonl'}")
    with pytest.raises(ValueError, match="two texts are called more; name them as NAME=FILE"):
        evaluate(config_for(folder, perplexity=twice))


def test_a_source_may_name_its_column(folder):
    """Of one call that measures texts of several forms; a path with the sign stays a path."""
    odd = folder / "a#b.txt"
    odd.write_text("two small birds near the old boat. " * 9)
    words = f"words={folder / 'words.jsonl'}#output"
    found = read_domains((words, str(odd)), tiny_tokenizer(), window=16, stride=8)
    assert [one.name for one in found] == ["words", "a#b"]
    text = "\n\n".join(record["output"] for record in tiny_records(8))
    assert int(found[0].counts.sum()) == len(tiny_tokenizer()(text).input_ids) - 1


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("wikitext", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("c4", ("allenai/c4", "en", "validation")),
    ],
)
def test_the_texts_that_papers_name_have_names(monkeypatch, name, asked):
    """They are streamed from the hub, and of C4 a part is read."""
    read = []

    def stream(repository, *, name, split, streaming, revision):
        assert (repository, name, split) == asked
        assert streaming
        for number in range(200):
            read.append(number)
            yield {"text": "two small birds near the old boat. " * 30}

    monkeypatch.setattr("datasets.load_dataset", stream)
    (domain,) = read_domains((name,), tiny_tokenizer(), window=16, stride=16)
    assert domain.name == name
    assert (len(domain.ids) == 256) == (name == "c4")
    assert (len(read) == 200) == (name == "wikitext")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stride": 64}, "more.txt: --stride 64 must be within 1 and 32"),
        ({"teacher": "x"}, "--perplexity needs no teacher"),
        ({"num_fewshot": 2}, "--num-fewshot 2 is of --tasks"),
        ({"perplexity": ()}, "give one of --cache-dir, --text, --perplexity and --tasks"),
    ],
)
def test_what_does_not_fit_is_refused(folder, changes, said):
    """In one line, with the text or the flag."""
    usual = (str(folder / "more.txt"),)
    with pytest.raises(ValueError, match=said):
        evaluate(config_for(folder, **{"perplexity": usual, **changes}))
    assert replace(config_for(folder), stride=None).used_stride == 16
