"""`QuantPlan`: a format for every tensor of a model, from a preset, from rules, or from a file.

Rules are `PATTERN=FORMAT`, joined by commas; the last that matches a tensor decides. A pattern is
one of `mlp`, `attention`, `embed`, `head`, `linears`, `all`, or a shell pattern for parameter names
(`layers.0.*`, `*.down_proj`). A word without `=` is a preset, or a format for all linears:

    q2a4, embed=int4-g32, layers.0.*=int4-g32, *.down_proj=gguf:q4_0

Preset names read MLP bits, then attention bits: `q2a4` keeps MLP weights at 2 bits and attention
weights at 4 (A never means activations). `_gN` sets weights per scale, `_rN` takes low-rank scales
of rank N instead: `q2a4_g64`, `q4a4_r32`. `q4_r32` is short for `q4a4_r32`. `_int` takes the
integer grids that runtimes hold: 2 bits are {-2, -1, 0, 1} per 64 weights (GGUF Q2_0), 4 bits
-8 .. 7 per 32 (Q4_0). Two formats joined by a plus are those of MLP and attention. `deploy` is the
pair that GGUF, MLX and compressed-tensors hold alike: `w2a16-g64+w4a16-g32`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

from qat.quant.spec import F16, F32, FORMATS, TensorSpec, make_spec
from qat.storage.decode import naming
from qat.storage.files import read_json

TensorKind = Literal["mlp", "attention", "embedding", "head", "other"]

# Of the patterns that are no names.
KINDS: dict[str, tuple[TensorKind, ...]] = {
    "mlp": ("mlp",),
    "attention": ("attention",),
    "embed": ("embedding",),
    "head": ("head",),
    "linears": ("mlp", "attention", "other"),
    "all": get_args(TensorKind),
}
MLP_NAMES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
ATTENTION_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
INT_GROUP_SIZES = {2: 64}  # blocks of GGUF Q2_0; others as Q4_0
PAIRS = {"deploy": "w2a16-g64+w4a16-g32"}
# Names of formats in students and commands of version 0.1.0.
OLD_FORMATS = {
    "gguf-q4_0": FORMATS["gguf:q4_0"],
    "gguf-q2_0": FORMATS["gguf:q2_0"],
    "gguf-iq4_nl": FORMATS["gguf:iq4_nl"],
    "gguf-q8_0": FORMATS["gguf:q8_0"],
    "mlx-4bit-g32": make_spec(4, codebook="int"),
    "mlx-2bit-g64": make_spec(2, group_size=64, codebook="int"),
    "coreml-lut4": FORMATS["coreml:lut4"],
    "coreml-lut2": FORMATS["coreml:lut2"],
}
PRESET_GRAMMAR = (
    "write q{MLP bits}a{attention bits}, with _gN for the group size or _rN for the rank of the "
    "scales and _int before it for the integer grids of runtimes: q2a4, q4a4, q2a4_g64, q4a4_r32, "
    "q2a4_int; or deploy; or rules such as embed=int4-g32"
)

_PRESET = re.compile(
    r"q(?P<mlp>[2-8])(?:a(?P<attention>[2-8]))?(?P<int>_int)?(?:_(?P<kind>[gr])(?P<size>\d+))?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """What a plan must know of a parameter."""

    shape: tuple[int, ...]
    kind: TensorKind = "other"
    is_quantizable: bool = False
    """Whether it is the weight of a linear or an embedding."""
    aliases: tuple[str, ...] = ()
    """Names of parameters that are tied to it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A pattern and the format of the tensors that it matches."""

    pattern: str
    spec: TensorSpec

    def __str__(self) -> str:
        """Return the rule as it is written."""
        return f"{self.pattern}={self.spec.name}"

    def matches(self, name: str, info: TensorInfo) -> bool:
        """Return whether a parameter is meant, by its own name or one that is tied to it."""
        if not info.is_quantizable:
            return False
        if self.pattern == "head" and info.kind == "embedding":
            return bool(info.aliases)
        if self.pattern in KINDS:
            return info.kind in KINDS[self.pattern]
        return any(self.matches_name(each) for each in (name, *info.aliases))

    def matches_name(self, name: str) -> bool:
        """Return whether a shell pattern fits a name, with or without `model.` and `.weight`."""
        short = name.removesuffix(".weight")
        forms = (name, short, name.removeprefix("model."), short.removeprefix("model."))
        return any(fnmatchcase(form, self.pattern) for form in forms)


@dataclass(frozen=True, slots=True)
class PlanRules:
    """A plan for any model: what `parse_plan` returns and `resolve` makes a plan of."""

    name: str
    rules: tuple[Rule, ...]

    def spec_of_kind(self, kind: TensorKind) -> TensorSpec | None:
        """Return the format that the last rule for a whole kind gives it."""
        found = [rule.spec for rule in self.rules if kind in KINDS.get(rule.pattern, ())]
        return found[-1] if found else None

    def resolve(self, tensors: Mapping[str, TensorInfo]) -> "QuantPlan":
        """Return the plan of a model.

        Args:
            tensors: Every parameter of the model, tied ones once, in the model's order.

        Raises:
            ValueError: If a rule matches nothing or its format does not fit a tensor.
        """
        specs = {name: F32 if len(info.shape) < 2 else F16 for name, info in tensors.items()}
        deciding: dict[str, Rule] = {}
        for rule in self.rules:
            found = [name for name, info in tensors.items() if rule.matches(name, info)]
            if not found:
                raise ValueError(no_match(rule, tensors))
            deciding |= dict.fromkeys(found, rule)
        for name, rule in deciding.items():
            check_fit(rule, name, tensors[name])
            specs[name] = rule.spec
        shapes = {name: info.shape for name, info in tensors.items()}
        return QuantPlan(name=self.name, specs=specs, shapes=shapes)


def check_fit(rule: Rule, name: str, info: TensorInfo) -> None:
    """Refuse a format that does not fit a tensor, naming both."""
    try:
        rule.spec.check(info.shape)
    except ValueError as error:
        raise ValueError(f"{rule} does not fit {name.removesuffix('.weight')}: {error}") from error


def no_match(rule: Rule, tensors: Mapping[str, TensorInfo]) -> str:
    """Return what is wrong with a rule that no tensor matches."""
    if rule.pattern in ("mlp", "attention"):
        names = MLP_NAMES if rule.pattern == "mlp" else ATTENTION_NAMES
        return (
            f"the model has no {rule.pattern} linear named {', '.join(names)}; "
            "this model family is not supported"
        )
    examples = [name.removesuffix(".weight") for name, info in tensors.items()]
    tied = "; its head is tied to the embedding" if rule.pattern == "head" else ""
    return (
        f"rule {rule} matches no weight of a linear or an embedding{tied}; names are such as "
        f"{', '.join(examples[:2])}"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantPlan:
    """The format of every parameter of one model; tied parameters have one entry."""

    name: str
    """As given: a preset, or rules."""
    specs: Mapping[str, TensorSpec]
    """By parameter name, in the model's order."""
    shapes: Mapping[str, tuple[int, ...]]
    """By parameter name."""

    @property
    def quantized(self) -> dict[str, TensorSpec]:
        """The formats of quantized weights by the names of their modules."""
        return {
            name.removesuffix(".weight"): spec
            for name, spec in self.specs.items()
            if spec.is_quantized
        }

    @property
    def file_bytes(self) -> int:
        """Bytes of all tensors in a file; headers and tokenizers come on top."""
        return sum(spec.size_bytes(self.shapes[name]) for name, spec in self.specs.items())

    @property
    def num_weights(self) -> int:
        """Number of parameters."""
        return sum(map(prod, self.shapes.values()))

    def spec_of_kind(self, kind: TensorKind) -> TensorSpec | None:
        """Return the one format of a kind's weights; None where they have several or none."""
        found = {spec for name, spec in self.quantized.items() if tensor_kind(name) == kind}
        return found.pop() if len(found) == 1 else None

    def with_specs(self, specs: Mapping[str, TensorSpec], *, name: str = "") -> "QuantPlan":
        """Return the plan with other formats for some modules' weights."""
        changed = {f"{module}.weight": spec for module, spec in specs.items()}
        return QuantPlan(
            name=name or self.name, specs={**self.specs, **changed}, shapes=self.shapes
        )

    def changed(self, change: Callable[[TensorSpec], TensorSpec], *, name: str = "") -> "QuantPlan":
        """Return the plan with every quantized weight's format changed."""
        return self.with_specs(
            {module: change(spec) for module, spec in self.quantized.items()}, name=name
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return the table of the plan: tensors of one kind and format together.

        Returns:
            Rows of tensors (a pattern), count, format, bits_per_weight, bytes, share of all bytes.
        """
        groups: dict[tuple[str, str], list[str]] = {}
        for name, spec in self.specs.items():
            groups.setdefault((re.sub(r"\.\d+\.", ".*.", name), spec.name), []).append(name)
        total = self.file_bytes
        rows = []
        for (pattern, spec_name), names in groups.items():
            num_bytes = sum(self.specs[name].size_bytes(self.shapes[name]) for name in names)
            weights = sum(prod(self.shapes[name]) for name in names)
            rows.append(
                {
                    "tensors": pattern.removeprefix("model.").removesuffix(".weight"),
                    "count": len(names),
                    "format": spec_name,
                    "bits_per_weight": round(8 * num_bytes / weights, 4),
                    "bytes": num_bytes,
                    "share": round(num_bytes / total, 4),
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint header or a file."""
        return {"name": self.name, "tensors": {name: s.name for name, s in self.specs.items()}}


def plan_from_dict(values: Any, tensors: Mapping[str, TensorInfo]) -> QuantPlan:
    """Return the plan that `QuantPlan.to_dict` or version 0.1.0 described, for a model.

    Args:
        values: name and tensors; or a scheme of 0.1.0: name, mlp and attention.
        tensors: Every parameter of the model.

    Raises:
        ValueError: If a field is missing or unknown, or a tensor is not the model's.
    """
    check_plan_values(values)
    if "mlp" in values:
        return rules_from_scheme(values).resolve(tensors)
    named = values["tensors"]
    if named.keys() != tensors.keys():
        odd = min(named.keys() ^ tensors.keys())
        place = "in the plan only" if odd in named else "in the model only"
        raise ValueError(
            f"plan {values['name']!r} is of another model: {odd} is {place}; make it again with "
            "`qat plan` of this model"
        )
    specs = {name: TensorSpec.from_name(named[name]) for name in tensors}
    shapes = {name: info.shape for name, info in tensors.items()}
    for name, spec in specs.items():
        if spec.is_quantized and not tensors[name].is_quantizable:
            raise ValueError(f"plan {values['name']!r} quantizes {name}, which must stay dense")
        check_fit(Rule(name, spec), name, tensors[name])
    return QuantPlan(name=values["name"], specs=specs, shapes=shapes)


def check_plan_values(values: object) -> None:
    """Refuse plain values that are no plan, neither of this version nor of 0.1.0.

    Raises:
        ValueError: Says what is missing.
    """
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        raise ValueError(f"plan {values!r} has no name; make the checkpoint or the file again")
    if "mlp" in values:
        rules_from_scheme(values)
        return
    named = values.get("tensors")
    if not isinstance(named, dict) or not all(isinstance(spec, str) for spec in named.values()):
        raise ValueError(f"plan {values['name']!r} lists no tensors; make it again with `qat plan`")
    for spec in set(named.values()):
        TensorSpec.from_name(spec)


def kind_specs(values: dict[str, Any]) -> dict[TensorKind, TensorSpec | None]:
    """Return the format of each kind of quantized weight in a plan's plain values.

    Args:
        values: As `plan_from_dict` takes them.

    Returns:
        None for a kind whose weights have several formats.
    """
    if "mlp" in values:
        return {rule.pattern: rule.spec for rule in rules_from_scheme(values).rules}
    found: dict[TensorKind, set[TensorSpec]] = {}
    for name, spec_name in values["tensors"].items():
        spec = TensorSpec.from_name(spec_name)
        if spec.is_quantized:
            found.setdefault(tensor_kind(name.removesuffix(".weight")), set()).add(spec)
    return {kind: specs.pop() if len(specs) == 1 else None for kind, specs in found.items()}


def rules_from_scheme(values: dict[str, Any]) -> PlanRules:
    """Return the rules that a scheme of version 0.1.0 stands for.

    Raises:
        ValueError: If a field is missing or unknown.
    """
    try:
        kinds = {kind: make_spec(**old_fields(values[kind])) for kind in ("mlp", "attention")}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"scheme {values} has other fields than this version reads ({error}); "
            "make the checkpoint again"
        ) from error
    return PlanRules(values["name"], tuple(Rule(kind, spec) for kind, spec in kinds.items()))


def old_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a layer's scheme of version 0.1.0 under today's names."""
    return {"floor" if key == "scale_floor" else key: value for key, value in values.items()}


def parse_plan(text: str) -> PlanRules:
    """Return the rules that a preset's name, or rules joined by commas, stand for.

    Raises:
        ValueError: If a part does not follow the grammar of this module.
    """
    rules: list[Rule] = []
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        pattern, equals, spec = (piece.strip() for piece in part.partition("="))
        rules += [Rule(pattern, format_from_name(spec))] if equals else preset_rules(part)
    return PlanRules(text.strip(), tuple(rules))


def format_from_name(name: str) -> TensorSpec:
    """Return the format of a name, those of version 0.1.0 among them."""
    return OLD_FORMATS.get(name) or TensorSpec.from_name(name)


def preset_rules(name: str) -> list[Rule]:
    """Return the rules of a preset, or of one or two formats' names.

    Raises:
        ValueError: If the name is unknown.
    """
    match = _PRESET.fullmatch(name)
    if match and not (match["kind"] == "r" and not int(match["size"])):
        mlp_bits = int(match["mlp"])
        bits = {"mlp": mlp_bits, "attention": int(match["attention"] or mlp_bits)}
        return [Rule(kind, preset_spec(count, match)) for kind, count in bits.items()]
    mlp, plus, attention = PAIRS.get(name, name).partition("+")
    try:
        pair = (format_from_name(mlp), format_from_name(attention if plus else mlp))
    except ValueError as error:
        raise ValueError(f"plan {name!r} is unknown; {PRESET_GRAMMAR} ({error})") from error
    return [Rule("mlp", pair[0]), Rule("attention", pair[1])]


def preset_spec(bits: int, match: re.Match[str]) -> TensorSpec:
    """Return the format of one kind of layer in a preset."""
    size = {"g": "group_size", "r": "rank"}.get(match["kind"])
    if size is None:
        return int_spec(bits) if match["int"] else make_spec(bits)
    codebook = "int" if match["int"] else "learned"
    return make_spec(bits, codebook=codebook, **{size: int(match["size"])})


def int_spec(bits: int) -> TensorSpec:
    """Return the integer grid of a number of bits in the group size of its runtime's format."""
    return make_spec(bits, group_size=INT_GROUP_SIZES.get(bits, 32), codebook="int")


def read_plan(text: str, tensors: Mapping[str, TensorInfo]) -> QuantPlan:
    """Return the plan that a preset, rules or a JSON file stand for, for a model.

    Args:
        text: As `--plan` takes it; a path that ends in .json is a file that `qat plan` wrote.
        tensors: Every parameter of the model.

    Raises:
        ValueError: If it follows no grammar, matches nothing or does not fit.
    """
    if not text.endswith(".json"):
        return parse_plan(text).resolve(tensors)
    values = read_json(Path(text))
    with naming(text):
        return plan_from_dict(values, tensors)


def tensor_kind(module_name: str) -> TensorKind:
    """Return what a linear is for, from the last part of its module's name."""
    last = module_name.rpartition(".")[2]
    if last in MLP_NAMES:
        return "mlp"
    if last in ATTENTION_NAMES:
        return "attention"
    return {"embed_tokens": "embedding", "lm_head": "head"}.get(last, "other")
