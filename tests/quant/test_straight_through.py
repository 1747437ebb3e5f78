"""Explicit gradients against two lines of dense autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.grids.scalar import expand_groups, nearest_indices, snap_float16
from qat.quant import straight_through as ste
from qat.quant.straight_through import (
    Dequantize,
    SnapFloat16,
    codebook_range,
    fake_quantize,
    fake_quantize_gradients,
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


def dense(latent, scale, codebook):
    """Return what `fake_quantize` promises, in tensors as large as the weight."""
    full = expand_groups(scale, latent.shape[1])
    normalized = latent / full
    low, high = codebook_range(codebook.detach())
    inside = ((normalized >= low) & (normalized <= high)).float()
    values = codebook[nearest_indices(normalized.detach(), codebook.detach()).long()]
    return full * (values + inside * (normalized - normalized.detach()))


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


@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_explicit_gradients_are_those_of_dense_autograd(case):
    """Latent weight, scales and codebook, groups of any size down to one weight, signs of both."""
    *tensors, gradient = problem(*case)
    explicit, result = gradients(fake_quantize, tensors, gradient)
    expected, wanted = gradients(dense, tensors, gradient)
    assert torch.equal(result, wanted)
    for left, right in zip(explicit, expected, strict=True):
        assert_close(left, right)


@settings(max_examples=40, deadline=None)
@given(case=cases)
def test_gradients_of_frozen_indices_are_those_of_dense_autograd(case):
    """Without a latent weight only scales and codebook move."""
    latent, scale, codebook, gradient = problem(*case)
    indices = nearest_indices(latent / expand_groups(scale, latent.shape[1]), codebook)

    def plain(scale, codebook):
        return expand_groups(scale, latent.shape[1]) * codebook[indices.long()]

    explicit, result = gradients(
        lambda scale, codebook: Dequantize.apply(indices, scale, codebook, torch.float32),
        (scale, codebook),
        gradient,
    )
    expected, wanted = gradients(plain, (scale, codebook), gradient)
    assert torch.equal(result, wanted)
    for left, right in zip(explicit, expected, strict=True):
        assert_close(left, right)


def test_the_latent_gradient_is_the_identity_inside_and_zero_outside():
    """Exactly: half a step beyond the outer values the weight stops being pushed."""
    codebook = torch.tensor([-2.0, -1.0, 0.0, 1.0])
    latent = torch.tensor([[-2.51, -2.5, -0.4, 1.5, 1.51]])
    gradient = torch.tensor([[3.0, 5.0, 7.0, 11.0, 13.0]])
    d_latent, _, _ = fake_quantize_gradients(
        latent, torch.ones(1, 1), codebook, gradient, True, False, False
    )
    assert d_latent.tolist() == [[0.0, 5.0, 7.0, 11.0, 0.0]]


def test_chunks_of_rows_change_nothing(monkeypatch):
    """However many rows are worked on at once; the codebook's sum alone may round otherwise."""
    *tensors, gradient = problem(37, 2, 8, 3, seed=1)
    whole, result = gradients(fake_quantize, tensors, gradient)
    monkeypatch.setattr(ste, "numbers_at_once", lambda _device: 5 * 16)
    assert len(ste.row_chunks(tensors[0])) == 8
    chunked, again = gradients(fake_quantize, tensors, gradient)
    assert torch.equal(result, again)
    assert torch.equal(whole[0], chunked[0])
    assert torch.equal(whole[1], chunked[1])
    assert_close(chunked[2], whole[2])


def test_an_unsorted_codebook_is_the_same_codebook():
    """Training may move values past each other; each keeps its own gradient."""
    latent, scale, codebook, gradient = problem(5, 2, 8, 3, seed=2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    sorted_gradients, result = gradients(fake_quantize, (latent, scale, codebook), gradient)
    mixed, again = gradients(fake_quantize, (latent, scale, codebook[order]), gradient)
    assert torch.equal(result, again)
    assert torch.equal(mixed[2], sorted_gradients[2][order])


def test_what_is_not_wanted_is_not_computed():
    """None stands for a gradient nobody asked for."""
    *tensors, gradient = problem(3, 2, 4, 2, seed=3)
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        found = fake_quantize_gradients(*tensors, gradient, *wanted)
        assert tuple(part is not None for part in found) == wanted


@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 3)])
def test_a_scale_of_zero_gives_no_nan(rows):
    """A row of zeros in a low-rank fit has scales of zero: one NaN there ended the whole run."""
    latent, scale, codebook, gradient = problem(3, 2, 4, 2, seed=4)
    scale[rows] = 0.0
    latent[rows, :2] = 0.0
    found, result = gradients(fake_quantize, (latent, scale, codebook), gradient)
    assert torch.isfinite(result).all()
    for part in found:
        assert torch.isfinite(part).all()
    if rows.stop < 3:
        clean, _ = gradients(fake_quantize, (latent[1:], scale[1:], codebook), gradient[1:])
        assert torch.equal(found[0][1:], clean[0])
        assert torch.equal(found[1][1:], clean[1])


def test_float16_rounding_lets_gradients_through():
    """Forward = rounded to the bit, backward = identity, exactly."""
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gradient = torch.arange(50.0)
    rounded = SnapFloat16.apply(values)
    rounded.backward(gradient)
    assert torch.equal(rounded, snap_float16(values.detach()))
    assert torch.equal(values.grad, gradient)
