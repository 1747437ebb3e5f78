"""Explicit gradients against two lines of dense autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.grids.scalar import (
    ScalarGrid,
    codebook_range,
    expand_groups,
    fixed_codebook,
    nearest_indices,
    snap_float16,
)
from qat.quant import straight_through as ste
from qat.quant.straight_through import (
    Dequantize,
    SnapFloat16,
    fake_quantize,
    weight_gradients,
)


def problem(rows, groups, size, bits, seed, *, spread=1.0):
    """Return latent weight, scales of both signs, codebook and an arriving gradient."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.where(torch.rand(rows, groups, generator=generator) < 0.3, -1.0, 1.0)
    scale = sign * (0.5 + torch.rand(rows, groups, generator=generator))
    latent = spread * 1.5 * torch.randn(rows, groups * size, generator=generator)
    codebook = torch.randn(2**bits, generator=generator).sort().values
    gradient = torch.randn(rows, groups * size, generator=generator)
    return latent, scale, codebook, gradient


GRID = ScalarGrid(3)  # rounds to whatever codebook it is given


def rounded(latent, scale, codebook, offset=None):
    """Return the fake-quantized weight; tests differ in the tensors alone."""
    return fake_quantize(latent, scale, codebook, GRID, offset=offset)


def random_offset(scale):
    """Return offsets of either sign, one per scale."""
    return torch.randn(scale.shape, generator=torch.Generator().manual_seed(scale.numel()))


def dense(latent, scale, codebook, offset=None):
    """Return what `fake_quantize` promises, in tensors as large as the weight."""
    full = expand_groups(scale, latent.shape[1])
    shift = 0 if offset is None else expand_groups(offset, latent.shape[1])
    normalized = (latent - shift) / full
    low, high = codebook_range(codebook.detach())
    inside = ((normalized >= low) & (normalized <= high)).float()
    values = codebook[nearest_indices(normalized.detach(), codebook.detach()).long()]
    return full * (values + inside * (normalized - normalized.detach())) + shift


def gradients(function, tensors, gradient):
    """Return the gradient of each tensor, and what the function gives."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    result = function(*leaves)
    result.backward(gradient)
    return [leaf.grad for leaf in leaves], result.detach()


def assert_close(left, right):
    """Equal but for the order of sums in float32."""
    assert torch.allclose(left, right, rtol=1e-5, atol=1e-5 * max(1.0, float(right.abs().max())))


cases = st.tuples(
    st.integers(1, 6), st.integers(1, 4), st.integers(1, 8), st.integers(1, 4), st.integers(0, 999)
)


@pytest.mark.recipe
@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_explicit_gradients_are_those_of_dense_autograd(case):
    """Latent weight, scales and codebook, groups of any size down to one weight, signs of both."""
    *tensors, gradient = problem(*case)
    explicit, result = gradients(rounded, tensors, gradient)
    expected, wanted = gradients(dense, tensors, gradient)
    assert torch.equal(result, wanted)
    for left, right in zip(explicit, expected, strict=True):
        assert_close(left, right)


@pytest.mark.recipe
@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_gradients_with_offsets_are_those_of_dense_autograd(case):
    """Scale and offset move where a weight lies outside; inside only the rounding error counts."""
    latent, scale, codebook, gradient = problem(*case)
    tensors = (latent, scale, codebook, random_offset(scale))
    explicit, result = gradients(rounded, tensors, gradient)
    expected, wanted = gradients(dense, tensors, gradient)
    torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-6)
    for left, right in zip(explicit, expected, strict=True):
        assert_close(left, right)


@settings(max_examples=40, deadline=None)
@given(case=cases, has_offset=st.booleans())
def test_gradients_of_frozen_indices_are_those_of_dense_autograd(case, has_offset):
    """Without a latent weight only scales, offsets and codebook move."""
    latent, scale, codebook, gradient = problem(*case)
    indices = nearest_indices(latent / expand_groups(scale, latent.shape[1]), codebook)

    def plain(scale, codebook, offset=None):
        weight = expand_groups(scale, latent.shape[1]) * codebook[indices.long()]
        return weight if offset is None else weight + expand_groups(offset, latent.shape[1])

    def explicit_form(scale, codebook, offset=None):
        return Dequantize.apply(indices, scale, offset, codebook, GRID, torch.float32)

    tensors = (scale, codebook, *([random_offset(scale)] if has_offset else []))
    explicit, result = gradients(explicit_form, tensors, gradient)
    expected, wanted = gradients(plain, tensors, gradient)
    assert torch.equal(result, wanted)
    for left, right in zip(explicit, expected, strict=True):
        assert_close(left, right)


def test_the_latent_gradient_is_the_identity_inside_and_zero_outside():
    """Exactly: half a step beyond the outer values the weight stops being pushed."""
    codebook = torch.tensor([-2.0, -1.0, 0.0, 1.0])
    latent = torch.tensor([[-2.51, -2.5, -0.4, 1.5, 1.51]])
    gradient = torch.tensor([[3.0, 5.0, 7.0, 11.0, 13.0]])
    needed = (True, False, False, False)
    d_latent, *_ = weight_gradients(
        GRID, latent, (torch.ones(1, 1), None), codebook, gradient, needed
    )
    assert d_latent.tolist() == [[0.0, 5.0, 7.0, 11.0, 0.0]]


def test_chunks_of_rows_change_nothing(monkeypatch):
    """However many rows are worked on at once; the codebook's sum alone may round otherwise."""
    *tensors, gradient = problem(37, 2, 8, 3, seed=1)
    whole, result = gradients(rounded, tensors, gradient)
    monkeypatch.setattr(ste, "numbers_at_once", lambda _device: 5 * 16)
    assert len(ste.row_chunks(tensors[0])) == 8
    chunked, again = gradients(rounded, tensors, gradient)
    assert torch.equal(result, again)
    assert torch.equal(whole[0], chunked[0])
    assert torch.equal(whole[1], chunked[1])
    assert_close(chunked[2], whole[2])


def test_an_unsorted_codebook_is_the_same_codebook():
    """Training may move values past each other; each keeps its own gradient."""
    latent, scale, codebook, gradient = problem(5, 2, 8, 3, seed=2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    sorted_gradients, result = gradients(rounded, (latent, scale, codebook), gradient)
    mixed, again = gradients(rounded, (latent, scale, codebook[order]), gradient)
    assert torch.equal(result, again)
    assert torch.equal(mixed[2], sorted_gradients[2][order])


def test_what_is_not_wanted_is_not_computed():
    """None stands for a gradient nobody asked for."""
    *tensors, gradient = problem(3, 2, 4, 2, seed=3)
    latent, scale, codebook = tensors
    scales = (scale, random_offset(scale))
    for place in range(4):
        needed = tuple(place == each for each in range(4))
        found = weight_gradients(GRID, latent, scales, codebook, gradient, needed)
        assert tuple(part is not None for part in found) == needed


@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 3)])
def test_a_scale_of_zero_gives_no_nan(rows):
    """A row of zeros in a low-rank fit has scales of zero: one NaN there ended the whole run."""
    latent, scale, codebook, gradient = problem(3, 2, 4, 2, seed=4)
    scale[rows] = 0.0
    latent[rows, :2] = 0.0
    found, result = gradients(rounded, (latent, scale, codebook), gradient)
    assert torch.isfinite(result).all()
    for part in found:
        assert torch.isfinite(part).all()
    if rows.stop < 3:
        clean, _ = gradients(rounded, (latent[1:], scale[1:], codebook), gradient[1:])
        assert torch.equal(found[0][1:], clean[0])
        assert torch.equal(found[1][1:], clean[1])


def test_float16_rounding_lets_gradients_through():
    """Forward = rounded to the bit, backward = identity, exactly."""
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gradient = torch.arange(50.0)
    snapped = SnapFloat16.apply(values)
    snapped.backward(gradient)
    assert torch.equal(snapped, snap_float16(values.detach()))
    assert torch.equal(values.grad, gradient)


@pytest.mark.device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int", "learned", "iq4_nl"])
def test_an_accelerator_forms_the_weights_of_the_cpu(accelerator, kind, dtype):
    """To the bit; gradients are sums in another order."""
    grid = ScalarGrid(4, kind)
    latent, scale, codebook, gradient = problem(64, 3, 32, 4, seed=5)
    codebook = codebook if kind == "learned" else fixed_codebook(kind, 4)
    tensors, there = (latent, scale, codebook), accelerator.torch_device
    formed = fake_quantize(*tensors, grid, dtype)
    found = fake_quantize(*(x.to(there) for x in tensors), grid, dtype)
    assert torch.equal(found.cpu(), formed)
    needed = (True, True, False, kind == "learned")
    expected = weight_gradients(grid, latent, (scale, None), codebook, gradient, needed)
    latent, scale, codebook, gradient = (x.to(there) for x in (latent, scale, codebook, gradient))
    again = weight_gradients(grid, latent, (scale, None), codebook, gradient, needed)
    for one, other in zip(expected, again, strict=True):
        assert one is None or torch.allclose(other.cpu(), one, rtol=1e-4, atol=1e-5)
