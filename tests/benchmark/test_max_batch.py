import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.benchmark.max_batch import STEP, batches_below, largest_batch

LIMIT = 6_000_000_000
BUDGET = 8


class Memory:
    """Memory by batch that counts who asks; what is above the limit is None."""

    def __init__(self, bytes_of, limit=LIMIT):
        self.bytes_of, self.limit, self.asked = bytes_of, limit, {}

    def __call__(self, batch):
        assert batch not in self.asked, "each size is probed once"
        held = self.bytes_of(batch)
        self.asked[batch] = int(held) if held <= self.limit else None
        return self.asked[batch]

    def is_settled(self, largest):
        """Whether the answer was measured: it fits, its next multiple of 8 does not."""
        return self.asked[largest] is not None and self.asked[largest + STEP] is None


@pytest.mark.recipe
@given(
    fixed=st.floats(0, 0.9),
    room=st.floats(STEP, 500),
    noise=st.lists(st.floats(-0.5, 0.5), min_size=97, max_size=97),
)
def test_for_any_affine_memory_the_answer_is_measured_within_the_budget(fixed, room, noise):
    """Whatever the fixed share and the room, with noise of half a sequence each way."""
    each = LIMIT * (1 - fixed) / room
    memory = Memory(lambda batch: LIMIT * fixed + each * (batch + noise[batch % 97]))
    largest = largest_batch(memory, LIMIT)
    if largest >= STEP:
        assert memory.is_settled(largest)
        assert abs(largest - room) <= STEP + 1
    else:
        assert room < STEP + 1
    assert len(memory.asked) <= BUDGET


@pytest.mark.recipe
@given(
    fixed=st.floats(0, 0.9),
    room=st.floats(1, 5000),
    share=st.floats(0, 0.05),
    told=st.floats(0.5, 2.0),
    seed=st.integers(0, 2**32),
)
def test_the_answer_is_measured_whatever_the_noise(fixed, room, share, told, seed):
    """Also where what the device says of its memory is wrong by a factor of two."""
    import random

    each = LIMIT * (1 - fixed) / room

    def held(batch):
        noise = random.Random(f"{seed} {batch}").uniform(-share, share)
        return (LIMIT * fixed + each * batch) * (1 + noise)

    memory = Memory(held)
    largest = largest_batch(memory, int(LIMIT * told))
    if largest >= STEP:
        assert memory.is_settled(largest)
    assert len(memory.asked) < 40


def test_exact_memory_takes_few_probes():
    """8, what surely fits by it, the prediction, its next: four."""
    memory = Memory(lambda batch: 2e9 + 35e6 * batch)
    assert largest_batch(memory, LIMIT) == 112  # (6 - 2) / 0.035 = 114
    assert list(memory.asked) == [8, 16, 112, 120]


def test_there_is_no_cap():
    """Ten thousand sequences are found as well; the seeds' search ended at 512."""
    memory = Memory(lambda batch: 1e9 + 5e5 * batch)
    assert largest_batch(memory, LIMIT) == 10_000
    assert len(memory.asked) <= BUDGET


def test_memory_that_is_not_told_is_found_by_doubling():
    """A device that does not tell its size."""
    memory = Memory(lambda batch: 1e9 + 50e6 * batch)
    assert largest_batch(memory, None) == 96
    assert memory.is_settled(96)


@pytest.mark.parametrize(("room", "largest"), [(7.9, 4), (2, 2), (1, 1), (0.5, 0)])
def test_where_8_does_not_fit_fewer_are_tried(room, largest):
    """Powers of two down to one; 0 says that none fits."""
    memory = Memory(lambda batch: LIMIT * batch / room)
    assert largest_batch(memory, LIMIT) == largest


def test_an_error_of_a_probe_ends_the_search():
    """It is no answer to whether a batch fits."""

    def fail(batch):
        raise ValueError("batch 8 failed")

    with pytest.raises(ValueError, match="batch 8 failed"):
        largest_batch(fail, LIMIT)


def test_sizes_that_may_be_faster_stay_within_the_budget():
    """Half and quarter, unless they are known, too small, or the probes are used up."""
    assert batches_below(112, [8, 16, 112, 120], 8) == [56, 24]
    assert batches_below(112, [8, 16, 56, 112, 120, 128, 136], 8) == [24]
    assert batches_below(112, list(range(8)), 8) == []
    assert batches_below(16, [8, 16, 24], 8) == []
    assert batches_below(0, [8, 4, 2, 1], 8) == []
