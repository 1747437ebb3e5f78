"""The formats that an allocation may choose among, for each target of export."""

from collections.abc import Mapping

from qat.quant.plan import TensorInfo
from qat.quant.spec import F16, F32, FORMATS, TensorSpec

NOT_CHOSEN = ("gguf:i2_s",)  # which bitnet.cpp runs, llama.cpp does not
# Formats by target; a name that this version does not have is a fault that a test finds.
CANDIDATES: dict[str, tuple[str, ...]] = {
    "gguf": tuple(name for name in FORMATS if name.startswith("gguf:") and name not in NOT_CHOSEN),
    "mlx": tuple(name for name in FORMATS if name.startswith("mlx:")),
    "compressed-tensors": ("w2a16-g64", "w4a16-g32", "int8-g32-bf16"),
    "hf-quantized": tuple(f"lut{bits}-g{size}" for bits in (2, 3, 4, 6) for size in (32, 64)),
    "coreml": tuple(f"lut{bits}-{size}" for bits in (2, 3, 4, 6) for size in ("g32", "row")),
}
LINEARS_ONLY = ("compressed-tensors", "coreml")  # whose embeddings stay dense
# Linears that runtimes of compressed-tensors join to one matrix, which has one format.
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def candidates(target: str, tensors: Mapping[str, TensorInfo]) -> dict[str, list[TensorSpec]]:
    """Return the formats that each quantizable tensor may take, by parameter name.

    16 bits are the last resort of every tensor; others are left out where a row does not fit.
    """
    specs = [TensorSpec.from_name(name) for name in CANDIDATES[target]]
    found = {}
    for name, info in tensors.items():
        if not info.is_quantizable:
            continue
        is_body = info.kind not in ("embedding", "head")
        held = [spec for spec in specs if fits(spec, info.shape)]
        found[name] = [*(held if is_body or target not in LINEARS_ONLY else []), F16]
    return found


def fits(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    """Return whether a format holds a weight of a shape."""
    try:
        spec.check(shape)
    except ValueError:
        return False
    return True


def tied_groups(target: str, names: list[str]) -> list[list[str]]:
    """Return parameters that must share a format, each name in one group."""
    groups: dict[str, list[str]] = {}
    for name in names:
        owner, _, last = name.removesuffix(".weight").rpartition(".")
        joined = next((pair for pair in JOINED if last in pair), None)
        key = f"{owner}.{joined[0]}" if joined and target == "compressed-tensors" else name
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def other_spec(shape: tuple[int, ...]) -> TensorSpec:
    """Return the format of a tensor that stays dense."""
    return F32 if len(shape) < 2 else F16
