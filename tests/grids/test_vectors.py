"""Vector grids: nearest points, indices to bytes and back, refusals."""

import pytest
import torch

from qat.grids.vectors import VectorGrid, point_values

GRID = VectorGrid("iq2_s")
DEVICE = torch.device("cpu")


def test_points_are_those_of_the_format():
    """1,024 different points over three magnitudes."""
    points = point_values("iq2_s", DEVICE)
    assert points.shape == (1024, 8)
    assert points.unique().tolist() == [8, 25, 43]
    assert len(points.unique(dim=0)) == 1024


@pytest.mark.parametrize("kind", [None, "input", "weight"])
def test_round_finds_the_nearest_point(kind):
    """Against a loop over all points, with the importance of nothing, of inputs, of weights."""
    weight = torch.randn(5, 24) * 20
    shape = {None: None, "input": (24,), "weight": (5, 24)}[kind]
    importance = None if kind is None else torch.rand(shape) + 0.1
    mass = torch.ones(5, 24) if kind is None else importance.expand(5, 24)
    found = GRID.nearest(weight, None, importance)
    for row in range(5):
        for left in range(0, 24, 8):
            v, h = weight[row, left : left + 8], mass[row, left : left + 8]
            errors = [
                float((h * (v.abs() - point).square()).sum())
                for point in point_values("iq2_s", DEVICE)
            ]
            mine = float((h * (v - found[row, left : left + 8]).square()).sum())
            assert mine <= min(errors) * (1 + 1e-5)


def test_many_rows_round_as_each_alone():
    """Chunks that bound memory change nothing, nor do their borders."""
    weight, importance = torch.randn(400, 40) * 20, torch.rand(40) + 0.1
    together = GRID.round(weight, None, importance)
    alone = torch.cat([GRID.round(row, None, importance) for row in weight.split(1)])
    assert torch.equal(together, alone)


def test_values_round_to_themselves():
    """Every point with every sign of some pattern comes back."""
    indices = torch.arange(1024, dtype=torch.int32) | (torch.randint(256, (1024,)) << 10).int()
    indices = indices.view(8, 128)
    values = GRID.look_up(indices)
    assert torch.equal(GRID.round(values), indices)
    assert torch.equal(GRID.nearest(values), values)
    assert torch.equal(GRID.clamp(values), values)


@pytest.mark.parametrize("shape", [(1, 8), (3, 40), (16, 256)])
def test_pack_and_unpack_are_inverse(shape):
    """18 bits for 8 weights, rounded up to bytes."""
    indices = torch.randint(2**18, GRID.index_shape(shape), dtype=torch.int32)
    packed = GRID.pack(indices)
    assert packed.dtype == torch.uint8
    assert 0 <= 8 * len(packed) - GRID.size_bits(shape) < 24
    assert torch.equal(GRID.unpack(packed, shape), indices)
    with pytest.raises(ValueError, match="damaged"):
        GRID.unpack(packed[1:], shape)


def test_rows_of_broken_blocks_are_refused():
    """The message names the rule and the remedy."""
    with pytest.raises(ValueError, match="8 weights together.*20.*scalar grid"):
        GRID.check((4, 20))
    with pytest.raises(ValueError, match="iq2_s"):
        VectorGrid("iq9_x")
