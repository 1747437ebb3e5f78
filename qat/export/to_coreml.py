"""A student's quantized linears as one ML program, weights as palettes that Core ML expands.

    group scales     weight = constexpr_blockwise_shift_scale(constexpr_lut_to_dense(indices, lut),
                     scale), one scale per row or per block of it
    low-rank scales  y = sum_k (g_k a_k) * linear(b_k * x, constexpr_lut_to_dense(indices, lut)),
                     rank by rank, as the Neural Engine evaluates it

The program takes one input a width (`x_I`) and gives one output a layer. Whole models with
attention are the runtime's own conversion; the palettes here are what such a conversion keeps.

Shape legend: O out, I in, G groups of a row, R rank, C codebook values.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.export.checks import bytes_below, require_equal, require_float16, write_report
from qat.export.model_folder import require_students
from qat.grids.scalar import low_rank_scale
from qat.model.layers import FakeQuantLinear
from qat.model.surgery import current_indices, stored_parts
from qat.storage.files import atomic_folder

if TYPE_CHECKING:
    from coremltools.converters.mil.mil import Var

PACKAGE_NAME = "linears.mlpackage"
BITS = (2, 3, 4, 6, 8)  # widths of indices that the format has
FACTORS = ("scale_a", "magnitude", "scale_b")


def export_to_coreml(
    student: nn.Module, output: Path, *, text_source: Path, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Write the quantized linears as an .mlpackage whose palettes read back equal.

    The program has no text side. `dtype` is of palettes, scales and activations: float16 as the
    Neural Engine has it when not given, or float32, in which scale times palette does not round.
    """
    layers = require_students(student)
    dtype = dtype or torch.float16
    if find_spec("coremltools") is None:
        raise ValueError("--to coreml needs coremltools; pip install coremltools")
    for name, layer in layers.items():
        require_palette(name, layer, dtype)
    with atomic_folder(output) as temporary:
        save_program(layers, temporary / PACKAGE_NAME, dtype)
        return write_report(
            temporary,
            output,
            file=PACKAGE_NAME,
            compared=compare_with_package(layers, temporary / PACKAGE_NAME),
            rounded=0,
            dtype=str(dtype).removeprefix("torch."),
            file_bytes=bytes_below(temporary),
        )


def require_palette(name: str, layer: FakeQuantLinear, dtype: torch.dtype) -> None:
    """Refuse a layer that the format cannot hold."""
    if not isinstance(layer, FakeQuantLinear):
        raise ValueError(f"{name} is a quantized embedding; the program holds linears only")
    spec = layer.spec
    if dtype == torch.bfloat16:
        raise ValueError("Core ML has no bfloat16; use --dtype fp16 or fp32")
    if spec.bits not in BITS or spec.grid.num_values != 2**spec.bits:
        raise ValueError(
            f"{name} is {spec.name}, palettes have 2**bits values, bits {BITS}; export --to hf"
        )
    if spec.scale.integer_bits or spec.has_offset:
        raise ValueError(
            f"{name} is {spec.name}, palettes have one float16 scale; export --to gguf"
        )
    if spec.floor is not None:
        raise ValueError(f"{name} floors its scales; run `qat convert-v1-to-v2` first")
    if spec.stored_dtype == "float32" and dtype != torch.float32:
        raise ValueError(f"{name} has float32 scales; use --dtype fp32")
    if not spec.rank and spec.stored_dtype != "float32":
        require_float16(name, layer)


def save_program(layers: dict[str, FakeQuantLinear], path: Path, dtype: torch.dtype) -> None:
    """Build the program of all layers and save it."""
    import coremltools as ct
    from coremltools.converters.mil import mil

    kind = mil.types.fp16 if dtype == torch.float16 else mil.types.fp32
    widths = sorted({layer.in_features for layer in layers.values()})
    inputs = {f"x_{w}": mil.Builder.TensorSpec(shape=(1, w), dtype=kind) for w in widths}
    with mil.Function(inputs, ct.target.iOS18) as function:
        outputs = [
            add_linear(file_name(name), layer, function.inputs[f"x_{layer.in_features}"], dtype)
            for name, layer in tqdm(layers.items(), desc="coreml", unit="layer")
        ]
        function.set_outputs(outputs)
    program = mil.Program()
    program.add_function("main", function)
    model = ct.convert(
        program,
        source="milinternal",
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,  # leaves dtypes as they are
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(path))


def file_name(name: str) -> str:
    """Return a layer's name as the program writes it."""
    return name.replace(".", "_")


@torch.no_grad()
def add_linear(name: str, layer: FakeQuantLinear, x: "Var", dtype: torch.dtype) -> "Var":
    """Add a layer's operations to the program; return its output."""
    from coremltools.converters.mil import mil

    build, palette = mil.Builder, add_palette(name, layer, dtype)
    numpy_dtype = np.float16 if dtype == torch.float16 else np.float32
    if not layer.spec.rank:
        scale = layer.full_scale().numpy().astype(numpy_dtype)  # (O, G)
        weight = build.constexpr_blockwise_shift_scale(
            data=palette, scale=scale, name=f"{name}_weight"
        )
        return build.linear(x=x, weight=weight, name=name)
    parts = {
        n: layer.stored(getattr(layer, n).detach()).numpy().astype(numpy_dtype) for n in FACTORS
    }
    total = None
    for rank in range(layer.spec.rank):
        # Each factor is kept as it was trained; their product is left to the program.
        right = build.mul(x=x, y=parts["scale_b"][rank][None], name=f"{name}_b{rank}")
        term = build.linear(x=right, weight=palette, name=f"{name}_q{rank}")
        term = build.mul(x=term, y=parts["scale_a"][:, rank][None], name=f"{name}_a{rank}")
        term = build.mul(x=term, y=parts["magnitude"][rank], name=f"{name}_g{rank}")
        total = term if total is None else build.add(x=total, y=term, name=f"{name}_s{rank}")
    return build.identity(x=total, name=name)


def add_palette(name: str, layer: FakeQuantLinear, dtype: torch.dtype) -> "Var":
    """Add indices and codebook; return the codebook's values in the weight's places, (O, I)."""
    from coremltools.converters.mil import mil

    numpy_dtype = np.float16 if dtype == torch.float16 else np.float32
    kind = mil.types.string_to_builtin(f"uint{layer.spec.bits}")
    indices = current_indices(layer).numpy().astype(mil.types.nptype_from_builtin(kind))
    codebook = layer.stored(stored_parts(layer)["codebook"]).detach().numpy().astype(numpy_dtype)
    return mil.Builder.constexpr_lut_to_dense(
        indices=indices, lut=codebook.reshape(1, 1, -1, 1), name=f"{name}_palette"
    )


@torch.no_grad()
def compare_with_package(layers: dict[str, FakeQuantLinear], path: Path) -> int:
    """Return the number of layers in a saved package, each equal to the trained one."""
    constants = read_constants(path)
    for name, layer in layers.items():
        prefix = file_name(name)
        try:
            found = read_weight(constants, prefix, layer)
        except KeyError as error:
            raise ValueError(f"{name} is missing from the package ({error}); report it") from error
        require_equal(name, found, layer)
    return len(layers)


def read_weight(constants: dict[str, Any], prefix: str, layer: FakeQuantLinear) -> Tensor:
    """Return a layer's weight, (O, I) float32, from a package's constants."""
    indices, lut = constants[f"{prefix}_palette"]
    values = torch.from_numpy(lut.reshape(-1).astype(np.float32))
    quantized = values[torch.from_numpy(indices.astype(np.int64))]  # (O, I)
    if not layer.spec.rank:
        scale = torch.from_numpy(constants[f"{prefix}_weight"].astype(np.float32))
        return (quantized.view(*scale.shape, -1) * scale.unsqueeze(-1)).view_as(quantized)
    ranks = range(layer.spec.rank)

    def stacked(letter: str) -> Tensor:
        rows = [constants[f"{prefix}_{letter}{rank}"].reshape(-1) for rank in ranks]
        return torch.from_numpy(np.stack(rows).astype(np.float32))

    scale = low_rank_scale(stacked("a").T.contiguous(), stacked("g").flatten(), stacked("b"))
    return quantized * scale


def read_constants(path: Path) -> dict[str, Any]:
    """Return, by operation name, the constants that a package's operations hold."""
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load as load_program

    model = ct.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    program = load_program(spec, spec.specificationVersion, model.weights_dir)
    found: dict[str, Any] = {}
    for function in program.functions.values():
        for operation in function.operations:
            if operation.op_type == "constexpr_lut_to_dense":
                found[operation.outputs[0].name] = (operation.indices.val, operation.lut.val)
            elif operation.op_type == "constexpr_blockwise_shift_scale":
                found[operation.outputs[0].name] = operation.scale.val
            elif operation.op_type == "mul":
                found[operation.outputs[0].name] = operation.y.val
    return found
