"""Vector grids: nearest points and signs, indices to bytes and back, refusals."""

import pytest
import torch

from qat.grids.vectors import POINT_TABLES, VectorGrid, point_values

DEVICE = torch.device("cpu")
IQ2 = [8, 25, 43]
MAGNITUDES = {"iq3_xxs": [4, 12, 20, 28, 36, 44, 52, 62], "iq3_s": list(range(1, 16, 2))}
COUNTS = {"iq2_xxs": 256, "iq2_xs": 512, "iq2_s": 1024, "iq3_xxs": 256, "iq3_s": 512}

each_grid = pytest.mark.parametrize("grid", [VectorGrid(kind) for kind in POINT_TABLES], ids=str)


def some_weights(grid, *shape):
    """Return weights over their scales that reach the outer points, and beyond now and then."""
    return torch.randn(shape) * grid.table.reach / 2.5


def sign_patterns(grid):
    """Return the signs that a block may have, (patterns, B)."""
    size = grid.block_size
    signs = 1 - 2 * (torch.arange(2**size).unsqueeze(1) >> torch.arange(size) & 1)
    return signs[signs.prod(1) > 0] if grid.table.has_even_signs else signs


def least_error(grid, block, mass):
    """Return the error of the best points and signs of one block, by trying all of them."""
    points = point_values(grid.kind, DEVICE)
    aims = (sign_patterns(grid) * block).view(-1, grid.table.num_points, 1, grid.table.dimension)
    errors = ((aims - points).square() * mass.view(-1, 1, grid.table.dimension)).sum(-1)
    return float(errors.amin(-1).sum(-1).min())


@each_grid
def test_points_are_those_of_the_format(grid):
    """As many different points as its index counts, over the magnitudes of the type."""
    points = point_values(grid.kind, DEVICE)
    assert points.shape == (COUNTS[grid.kind], grid.table.dimension)
    assert points.unique().tolist() == MAGNITUDES.get(grid.kind, IQ2)
    assert len(points.unique(dim=0)) == len(points) == 2**grid.table.point_bits


@each_grid
@pytest.mark.parametrize("kind", [None, "input", "weight"])
def test_round_finds_the_nearest_points(grid, kind):
    """Against all points with all signs, with the importance of nothing, of inputs, of weights.

    Where signs are free or already even the best is found; else nearly always.
    """
    weight = some_weights(grid, 4, 24)
    shape = {None: None, "input": (24,), "weight": (4, 24)}[kind]
    importance = None if kind is None else torch.rand(shape) + 0.1
    mass = torch.ones(4, 24) if kind is None else importance.expand(4, 24)
    errors = (mass * (weight - grid.nearest(weight, None, importance)).square()).flatten()
    errors = errors.view(-1, grid.block_size).sum(1)
    blocks, masses = (t.reshape(-1, grid.block_size) for t in (weight, mass))
    best = torch.tensor([least_error(grid, *pair) for pair in zip(blocks, masses, strict=True)])
    exact = (errors - best).abs() <= 1e-4 * best
    assert (errors > 0.999 * best).all()
    assert exact[blocks.sign().prod(1) > 0 if grid.table.has_even_signs else slice(None)].all()
    assert errors.sum() <= 1.02 * best.sum()


@each_grid
def test_scores_are_what_rounding_saves(grid):
    """Of sum h v^2, without finding the points; hardly less where signs have to be even."""
    weight, importance = some_weights(grid, 16, 64), torch.rand(64) + 0.1
    error = (weight - grid.nearest(weight, None, importance)).square() * importance
    saved = (weight.square() * importance - error).view(16, -1, grid.block_size).sum(-1)
    scores = grid.best_scores(weight, importance)
    exact = (scores - saved).abs() <= 1e-4 * saved.abs() + 0.1
    if not grid.table.has_even_signs:
        assert exact.all()
    assert (exact | (scores < saved)).all()
    assert scores.sum() > 0.97 * saved.sum()


@each_grid
def test_signs_are_even_where_the_format_says_so(grid):
    """Of any index, and of what rounding finds."""
    if not grid.table.has_even_signs:
        return
    indices = torch.randint(2**grid.index_bits, (16, 8), dtype=torch.int32)
    for values in (grid.look_up(indices), grid.nearest(some_weights(grid, 16, 64))):
        assert (values.view(-1, 8).sign().prod(1) > 0).all()


@each_grid
def test_many_rows_round_as_each_alone(grid):
    """Chunks that bound memory change nothing, nor do their borders."""
    weight, importance = some_weights(grid, 120, 40), torch.rand(40) + 0.1
    together = grid.round(weight, None, importance)
    alone = torch.cat([grid.round(row, None, importance) for row in weight.split(1)])
    assert torch.equal(together, alone)


@each_grid
def test_values_round_to_themselves(grid):
    """Every point with some signs comes back."""
    count = len(point_values(grid.kind, DEVICE))
    indices = torch.arange(count, dtype=torch.int32)
    indices |= torch.randint(2**grid.index_bits // count, (count,), dtype=torch.int32) * count
    indices = indices.view(8, -1)
    values = grid.look_up(indices)
    assert torch.equal(grid.round(values), indices)
    assert torch.equal(grid.nearest(values), values)
    assert torch.equal(grid.clamp(values), values)


@each_grid
@pytest.mark.parametrize("shape", [(1, 8), (3, 40), (16, 256)])
def test_pack_and_unpack_are_inverse(grid, shape):
    """As many bits as indices have, rounded up to bytes."""
    indices = torch.randint(2**grid.index_bits, grid.index_shape(shape), dtype=torch.int32)
    packed = grid.pack(indices)
    assert packed.dtype == torch.uint8
    assert 0 <= 8 * len(packed) - grid.size_bits(shape) < 24
    assert torch.equal(grid.unpack(packed, shape), indices)
    with pytest.raises(ValueError, match="damaged"):
        grid.unpack(packed[1:], shape)


def test_rows_of_broken_blocks_are_refused():
    """The message names the rule and the remedy."""
    with pytest.raises(ValueError, match="8 weights together.*20.*scalar grid"):
        VectorGrid("iq3_xxs").check((4, 20))
    with pytest.raises(ValueError, match="4 weights together.*18.*scalar grid"):
        VectorGrid("iq3_s").check((4, 18))
    with pytest.raises(ValueError, match="iq2_s"):
        VectorGrid("iq9_x")
