"""Bytes of indices: every byte of a block's body stands for its own positions."""

import pytest
import torch

from qat.grids.block_bodies import BODIES, ternary_base3
from qat.grids.blocks import BLOCK_TYPES, TAILED
from qat.quant.spec import FORMATS, GGUF_TYPES


def test_every_type_with_one_scale_a_block_has_a_body():
    """Of the size that its bytes leave next to the scales."""
    assert sorted(BODIES) == sorted([*GGUF_TYPES.values(), *TAILED])
    for name, body in BODIES.items():
        kind, spec = BLOCK_TYPES[name], FORMATS[f"gguf:{name}"]
        heads = 1 if name == "mxfp4" else 4 if spec.has_offset else 0 if name in TAILED else 2
        q = torch.zeros(2, 3, kind.num_weights, dtype=torch.uint8)
        assert body(q).shape == (2, 3, kind.num_bytes - heads)


@pytest.mark.parametrize("name", BODIES)
def test_different_indices_have_different_bytes(name):
    """One weight at a time: each position changes exactly one byte, two where a bit lies apart."""
    kind, spec = BLOCK_TYPES[name], FORMATS[f"gguf:{name}"]
    q = torch.zeros(kind.num_weights, 1, kind.num_weights, dtype=torch.uint8)
    plain = BODIES[name](q[:1])
    q[:, 0].fill_diagonal_(spec.grid.num_values - 1)
    changed = (BODIES[name](q) != plain).sum(-1)
    assert (changed == (2 if spec.bits == 5 else 1)).all()
    assert len(BODIES[name](q).unique(dim=0)) == kind.num_weights


def test_every_group_of_five_ternary_values_reads_back():
    """All 243 of them, by the reader's arithmetic on bytes."""
    values = torch.arange(243)
    digits = torch.stack([values // 3**place % 3 for place in (4, 3, 2, 1, 0)])  # (5, 243)
    q = torch.zeros(243, 1, 256, dtype=torch.uint8)
    q[:, 0, 0:160:32] = digits.T.to(torch.uint8)
    byte = ternary_base3(q)[:, 0, 0]
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)
    found = ((byte.unsqueeze(1) * powers).int() * 3) >> 8  # the product wraps in uint8
    assert torch.equal(found, digits.T.int())
