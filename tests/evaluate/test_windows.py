import math

import pytest
import torch

from qat.evaluate.windows import cut_windows, perplexity_of_windows
from tests.tiny import tiny_llama

TEXT = torch.arange(100, 123)  # 23 tokens


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize(("window", "stride"), [(8, 3), (8, 6), (9, 1), (40, 5)])
def test_every_token_but_the_first_counts_once(window, stride, bos):
    """Whatever the stride; windows overlap, and the last one ends with the text."""
    ids, counts = cut_windows(TEXT, window, stride, bos)
    counted = ids[:, 1:][counts]
    assert counted.tolist() == TEXT[1:].tolist()
    own = ids if bos is None else ids[:, 1:]
    assert bos is None or (ids[:, 0] == bos).all()
    assert own[-1, -1] == TEXT[-1]
    assert (own[:, 1:] == own[:, :-1] + 1).all()
    assert ids.shape[1] == min(window, 23 + (bos is not None))


def test_disjoint_windows_lose_their_first_tokens():
    """The form of papers on quantization: a window of W predicts W - 1 tokens."""
    ids, counts = cut_windows(TEXT[:21], 7, 7, None)
    assert ids.tolist() == TEXT[:21].view(3, 7).tolist()
    assert counts.all()


@pytest.mark.parametrize(
    ("text", "window", "stride", "said"),
    [
        (TEXT, 8, 9, "--stride 9 must be within 1 and 8"),
        (TEXT, 8, 0, "--stride 0 must be within 1 and 8"),
        (TEXT[:1], 8, 4, "--window 8 over 1 tokens leaves none"),
        (TEXT, 1, 1, "--window 1 over 23 tokens leaves none"),
    ],
)
def test_windows_that_cannot_be_are_refused(text, window, stride, said):
    """With the numbers at fault."""
    with pytest.raises(ValueError, match=said):
        cut_windows(text, window, stride, None)


def test_perplexity_is_of_each_token_in_its_window():
    """The exponential of the mean nats, by a loop over windows and tokens."""
    model, text = tiny_llama(), torch.randint(261, (40,))
    total, count, counted = 0.0, 0, 0
    for start in (0, 6, 12, 18, 24, 28):
        part = text[start : start + 12]
        log_probs = torch.log_softmax(model(part[None]).logits[0], dim=-1)
        for place in range(1, 12):
            if start + place >= counted:
                total, count = total - log_probs[place - 1, part[place]].item(), count + 1
        counted = start + 12
    windows = cut_windows(text, 12, 6, None)
    values = perplexity_of_windows(model, *windows, device=torch.device("cpu"))
    assert values["tokens"] == count == 39
    assert values["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
