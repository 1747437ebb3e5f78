"""The bytes of a file, known from the config alone."""

import pytest

from qat.model.checkpoint import empty_model
from qat.pipelines.planned_size import PlannedSize
from qat.pipelines.sensitivity import choice_table
from qat.quant.allocate import allocate, smallest
from qat.quant.targets import candidates
from tests.tiny import save_tiny, tiny_llama


def sized(folder, target, **changes):
    """Return the sizes of a tiny model, and its table of formats without costs."""
    save_tiny(folder, tiny_llama(**changes))
    size = PlannedSize.of(target, empty_model(folder, device="meta"), folder)
    specs = candidates(target, size.tensors)
    costs = {name: {spec.name: 0.0 for spec in found} for name, found in specs.items()}
    return size, choice_table(costs, specs, size)


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_plan_comes_to_the_bytes_of_the_planned_file(tmp_path, tied):
    """Overhead and padded tensors add up to what `planned_file_bytes` counts."""
    from qat.export.gguf_size import planned_file_bytes

    size, table = sized(tmp_path, "gguf", tied=tied)
    config = empty_model(tmp_path, device="meta").config
    for allocation in (smallest(table), allocate(table, 10**9)):
        planned = planned_file_bytes(config, size.plan(allocation), text_source=tmp_path)
        assert size.file_bytes(allocation) == planned


def test_what_must_share_a_format_gets_one(tmp_path):
    """q, k and v of a layer get one format in files whose runtimes join them."""
    size, table = sized(tmp_path, "compressed-tensors")
    plan = size.plan(smallest(table))
    for layer in (0, 1):
        specs = {plan.specs[f"model.layers.{layer}.self_attn.{x}_proj.weight"] for x in "qkv"}
        assert len(specs) == 1
    assert plan.specs["model.norm.weight"].name == "f32"
    assert size.num_weights == plan.num_weights
