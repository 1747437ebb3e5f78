import pytest
import torch

from qat.cache.read import TeacherCache
from qat.cache.summary import bytes_by_field, plot_cache, summarize_cache, tail_mass, top_tokens
from qat.model.head import hidden_states, logits_of
from tests.tiny import tiny_cache, tiny_llama

CONTENTS = ["top-k", "sampled", "hidden"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return {content: tiny_cache(folder, content=content) for content in CONTENTS}


@pytest.mark.parametrize("content", CONTENTS)
def test_the_fields_account_for_the_bytes(folders, content):
    """What each field takes sums to the whole, file headers apart."""
    cache = TeacherCache.open(folders[content])
    whole = cache.manifest.bytes_per_token
    fields = sum(bytes_by_field(cache).values())
    headers = 1200 * len(cache.manifest.shards) / cache.manifest.num_tokens
    assert fields <= whole <= fields + headers


def test_the_tail_of_the_exact_ids_is_the_same_however_it_is_stored(folders):
    """top-k and sampled keep 8 ids each here, so they leave out the same mass."""
    tails = [
        tail_mass(TeacherCache.open(folders[content]).batch([0, 3]).signal)
        for content in ("top-k", "sampled")
    ]
    torch.testing.assert_close(*tails, rtol=1e-2, atol=1e-3)
    summary = summarize_cache(TeacherCache.open(folders["top-k"]))
    assert 0 < summary.tail_mass["p10"] <= summary.tail_mass["p50"] <= 1
    assert 0.8 < summary.counted_ratio < 1  # not the first token of a document
    assert summary.tokens == summary.sequences * 16
    assert (summary.block_start, summary.documents) == ("none", "separate")


def test_the_top_tokens_are_the_teachers(folders):
    """In order, with their probabilities under the whole softmax."""
    cache = TeacherCache.open(folders["top-k"])
    input_ids, token_ids, probabilities = top_tokens(cache, 2)
    batch = cache.batch([2])
    ids = batch.input_ids[:, :-1], batch.document_ids[:, :-1]
    truth = logits_of(tiny_llama(), hidden_states(tiny_llama(), *ids))[0].softmax(-1).topk(5)
    assert torch.equal(token_ids, truth.indices)
    torch.testing.assert_close(probabilities, truth.values, rtol=1e-2, atol=1e-4)


@pytest.mark.recipe
def test_the_picture_is_drawn(folders, tmp_path):
    """A PNG file."""
    plot_cache(TeacherCache.open(folders["sampled"]), tmp_path / "a.png", num_sequences=20)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
