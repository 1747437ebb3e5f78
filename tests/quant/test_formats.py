"""Schemes by the names of formats: the grids that files of runtimes hold."""

import pytest
import torch

from qat.grids.scalar import IQ4_NL, dequantize, fixed_codebook, snap_bfloat16, snap_float16
from qat.quant.fit import fit_weight
from qat.quant.scheme import FORMATS, LayerScheme, scheme_from_name
from qat.quant.straight_through import SnapBfloat16


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_a_scheme_of_all_layers(name):
    """Its own name, unlike `q2a4`, says nothing of kinds."""
    scheme = scheme_from_name(name)
    assert scheme.name == name
    assert scheme.mlp == scheme.attention == FORMATS[name]


def test_two_formats_are_mlp_and_attention():
    """The order of every other name."""
    scheme = scheme_from_name("gguf-q2_0+gguf-q4_0")
    assert scheme.mlp == LayerScheme(bits=2, group_size=64, codebook="int")
    assert scheme.attention == LayerScheme(bits=4, group_size=32, codebook="int")


def test_deploy_is_the_pair_with_scales_of_both_dtypes():
    """One student for GGUF, MLX and compressed-tensors."""
    scheme = scheme_from_name("deploy")
    assert (scheme.mlp.bits, scheme.mlp.group_size) == (2, 64)
    assert (scheme.attention.bits, scheme.attention.group_size) == (4, 32)
    assert scheme.mlp.stored_dtype == scheme.attention.stored_dtype == "bfloat16"


@pytest.mark.parametrize("name", ["gguf-q4_0+q4a4", "gguf-q4_0+", "deploy+gguf-q4_0", "gguf-q4_1"])
def test_a_name_that_is_no_format_is_refused_with_the_list(name):
    """The message shows names that work."""
    with pytest.raises(ValueError, match=r"gguf-q4_0, gguf-q2_0"):
        scheme_from_name(name)


def test_iq4_nl_has_the_values_of_its_type():
    """Ascending int8 numbers; four bits and no others."""
    codebook = fixed_codebook("iq4_nl", 4)
    assert codebook.tolist() == sorted(IQ4_NL)
    assert len(codebook) == 16
    with pytest.raises(ValueError, match="set bits to 4"):
        LayerScheme(bits=2, codebook="iq4_nl")


@pytest.mark.parametrize("name", ["gguf-q4_0", "gguf-q2_0", "gguf-iq4_nl"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_weights_on_the_grid_are_found_again(name, sign):
    """A fit to weights that lie on a format's grid, scales of either sign, loses nothing."""
    scheme = FORMATS[name]
    codebook = fixed_codebook(scheme.codebook, scheme.bits)
    indices = torch.randint(len(codebook), (6, 128), dtype=torch.uint8)
    indices[:, :: scheme.group_size] = 0  # the end of the longer arm is taken
    scale = sign * snap_float16(torch.rand(6, 128 // scheme.group_size) + 0.1)
    weight = dequantize(indices, scale, codebook)
    assert torch.equal(fit_weight(weight, scheme).dequantize(), weight)


def test_products_of_scale_and_value_are_exact():
    """In float32 as in float64, so that no order of operations changes a weight."""
    for name, scheme in FORMATS.items():
        if scheme.codebook != "learned":
            codebook = fixed_codebook(scheme.codebook, scheme.bits)
            scale = snap_float16(torch.randn(64, 1))
            exact = scale.double() * codebook.double()
            assert torch.equal((scale * codebook).double(), exact), name


def test_scales_of_both_dtypes_lose_nothing_in_either():
    """Also below the normal range of float16, where its numbers get coarse; zero stays zero."""
    values = torch.randn(4000) * 2.0 ** torch.randint(-30, 16, (4000,))
    values[0] = 0
    snapped = snap_bfloat16(values)
    assert torch.equal(snapped.bfloat16().float(), snapped)
    assert torch.equal(snapped.half().float(), snapped)
    assert torch.equal(snap_bfloat16(snapped), snapped)
    assert snapped[0] == 0
    normal = (values.abs() > 2**-14) & (values.abs() < 60000)
    assert ((snapped - values).abs()[normal] <= values.abs()[normal] * 2.0**-8).all()


def test_the_gradient_passes_through_the_rounding_to_both_dtypes():
    """Backward is the identity, exactly."""
    values = torch.randn(50, requires_grad=True)
    gradient = torch.arange(50.0)
    SnapBfloat16.apply(values).backward(gradient)
    assert torch.equal(values.grad, gradient)
