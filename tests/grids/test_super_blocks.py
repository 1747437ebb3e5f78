"""Super-block scales: their formula, their gradients, the nearest ones, refusals."""

import pytest
import torch

from qat.grids.scalar import snap_float16
from qat.grids.super_blocks import SuperBlockScale

SCALE = SuperBlockScale(16, 256, sub_bits=4, shift=0.5, factor=0.25)
SIGNED = SuperBlockScale(16, 256, sub_bits=6, shift=-32.0)
WITH_OFFSET = SuperBlockScale(32, 256, sub_bits=6, has_offset=True)


def as_is(values):
    return values


def some_parts(rows=6, inputs=512):
    sub_scale = torch.randint(16, (rows, inputs // 16)).float()
    return {
        "super_scale": snap_float16(torch.rand(rows, inputs // 256) + 0.01),
        "sub_scale": sub_scale,
    }


def test_scales_are_those_of_the_formula():
    """d * (0.5 + s) / 4, exact in float32: the same in float64."""
    parts = some_parts()
    scale, offset = SCALE.expand(parts, as_is)
    assert offset is None
    d = parts["super_scale"].double().repeat_interleave(16, dim=1)
    assert torch.equal(scale.double(), d * (0.5 + parts["sub_scale"].double()) / 4)


def test_scales_of_the_format_are_found_again():
    """Where a super-block's largest integer is the top of the range."""
    parts = some_parts()
    parts["sub_scale"][:, ::16] = 15
    found = SCALE.from_effective(SCALE.expand(parts, as_is)[0])
    assert all(torch.equal(found[name], parts[name]) for name in parts)


@pytest.mark.recipe
def test_nearest_scales_are_nearly_the_best():
    """Against every float16 super-scale of a range: within a fifth of the least error."""
    wanted = torch.rand(4, 16) + 0.3
    mass = torch.rand(4, 16) + 0.1
    found = SCALE.expand(SCALE.from_effective(wanted, mass), as_is)[0]
    mine = ((found - wanted).square() * mass).sum(1)
    for row in range(4):
        least = float("inf")
        for d in torch.linspace(0.1, 0.6, 2000):
            steps = (wanted[row] / (d / 4) - 0.5).round().clamp(0, 15)
            error = ((d / 4 * (steps + 0.5) - wanted[row]).square() * mass[row]).sum()
            least = min(least, float(error))
        assert mine[row] <= 1.2 * least + 1e-6


def test_gradients_are_those_of_the_plain_formula():
    """Rounding is the identity inside the range and blocks gradients outside it."""
    parts = some_parts(2, 256)
    parts["sub_scale"] += torch.rand_like(parts["sub_scale"]) - 0.5
    parts["sub_scale"][0, 0], parts["sub_scale"][1, 1] = -2.0, 17.0
    arriving = torch.randn(2, 16)
    given = {name: part.clone().requires_grad_() for name, part in parts.items()}
    SCALE.expand(given, as_is)[0].backward(arriving)
    d = parts["super_scale"]
    steps = parts["sub_scale"].clamp(0, 15).round()
    inside = (parts["sub_scale"] >= 0) & (parts["sub_scale"] <= 15)
    expected = (arriving * (steps + 0.5) / 4).sum(1, keepdim=True)
    assert torch.allclose(given["super_scale"].grad, expected)
    assert torch.allclose(given["sub_scale"].grad, arriving * d / 4 * inside)


def test_storable_parts_are_positive_and_in_range():
    """Zero, negative and infinite super-scales come back into float16's range."""
    parts = {
        "super_scale": torch.tensor([[0.0, -1.0, 1e9, 0.5]]),
        "sub_scale": torch.tensor([[-3.0, 20.0, 7.25, 0.0] * 16]),
    }
    pulled = SCALE.storable(parts)
    assert (pulled["super_scale"] > 0).all()
    assert torch.isfinite(pulled["super_scale"].half()).all()
    assert pulled["super_scale"][0, 3] == 0.5
    assert pulled["sub_scale"][0, :4].tolist() == [0.0, 15.0, 7.25, 0.0]


def test_rows_of_broken_super_blocks_are_refused():
    """The message names the rule and the remedy."""
    with pytest.raises(ValueError, match="576.*no multiple of the 256.*gguf:q4_0"):
        SCALE.check((8, 576))


def some_joined(form, rows=5, inputs=512):
    shapes = form.part_shapes((rows, inputs))
    return {
        name: torch.randint(2**form.sub_bits, shape).float()
        if name in form.integer_bits
        else snap_float16(torch.rand(shape) + 0.01)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("form", [SCALE, SIGNED, WITH_OFFSET])
def test_joined_parts_come_apart_again(form):
    """And stand for the scales and offsets of the formula."""
    parts = some_joined(form)
    found = form.split(*form.join(parts))
    assert found.keys() == parts.keys()
    assert all(torch.equal(found[name], part) for name, part in parts.items())
    scale, offset = form.expand(parts, as_is)
    joined = scale if offset is None else torch.cat([scale, offset], dim=1)
    assert torch.equal(form.joined(parts), joined)


@pytest.mark.parametrize("form", [SIGNED, WITH_OFFSET])
def test_scales_and_offsets_of_the_format_are_found_again(form):
    """Where a super-block's largest integers are the top of the range."""
    parts = some_joined(form)
    for name in form.integer_bits:
        parts[name][:, :: form.per_super] = form.top
        parts[name][:, 1 :: form.per_super] = 5  # of the other sign where there are two
    if form.is_signed:
        parts["sub_scale"] = parts["sub_scale"].clamp_min(1)
    found = form.joined(form.from_effective(form.joined(parts)))
    assert torch.allclose(found, form.joined(parts), atol=1e-6)


def test_offsets_are_never_above_zero_and_have_gradients():
    """Minus the product of their parts, whose gradients are those of the plain formula."""
    parts = some_joined(WITH_OFFSET, 2, 256)
    given = {name: part.clone().requires_grad_() for name, part in parts.items()}
    offset = WITH_OFFSET.expand(given, as_is)[1]
    assert (offset <= 0).all()
    arriving = torch.randn(2, 8)
    offset.backward(arriving)
    steps = parts["sub_offset"]
    expected = -(arriving * steps).sum(1, keepdim=True)
    assert torch.allclose(given["super_offset"].grad, expected)
    assert torch.allclose(given["sub_offset"].grad, -arriving * parts["super_offset"])


def test_storable_scales_of_either_sign_keep_it():
    """Also below float16's normal range, where integers up to 128 leave super-scales."""
    parts = {"super_scale": torch.tensor([[-1e-5, 0.0, -1e9]]), "sub_scale": torch.zeros(1, 48)}
    pulled = SIGNED.storable(parts)["super_scale"][0]
    assert pulled[0] == parts["super_scale"][0, 0]
    assert pulled[1] > 0
    assert pulled[2] == -65504
