"""Any program's GGUF file as a model in PyTorch, and what types it holds against its promise.

llama.cpp's K- and I-types come in blocks of 256 weights. Where a matrix has rows of another length,
its quantizer takes a type in blocks of 32 instead, mostly a larger one, and the file's name and
`general.file_type` stay as they were. SmolLM2-135M, with rows of 576, has such rows in most layers.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from qat.export.gguf_family import FAMILIES, require_family, rope_of
from qat.export.gguf_file import Header, block_sizes, read_header, read_weight, type_names
from qat.export.gguf_keys import rope_tensors
from qat.export.gguf_tensors import row_order
from qat.export.to_gguf import file_names, sources
from qat.grids.blocks import BLOCK_TYPES
from qat.model.attention import widen_attention
from qat.model.checkpoint import empty_model_of, read_model_config

FILE_TYPE = "general.file_type"
REMEDY = "give its own with --model-id"
HEAD = "output.weight"  # absent where the embedding is also the head


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufContents:
    """What a GGUF file promises and what it holds."""

    file_bytes: int
    promised: str | None
    """The file type that it names, such as Q3_K_M."""
    named: str | None
    """The file type in its own name."""
    types: dict[str, int]
    """Tensors of each type, most bytes first."""
    fallbacks: dict[str, int]
    """Of these, matrices whose rows are no whole blocks of the promised type."""
    odd_rows: tuple[int, ...]
    """Weights in such rows, ascending."""
    bits_per_weight: float
    """Of all tensors together."""

    def note(self) -> str:
        """Return what a reader of the file's name would not expect, then the types it holds."""
        parts, rest = [], Counter(self.types)
        if self.named and self.promised and self.named != self.promised:
            parts.append(f"its name says {self.named}, its {FILE_TYPE} {self.promised}")
        if self.fallbacks:
            rest -= Counter(self.fallbacks)
            rows = " and ".join(map(str, self.odd_rows))
            parts.append(
                f"{sum(self.fallbacks.values())} matrices are not of {self.promised or self.named} "
                f"types, whose blocks do not divide rows of {rows}: {told(self.fallbacks)}"
            )
        parts.append(f"{'else' if self.fallbacks else 'holds'} {told(rest)}")
        return "; ".join([*parts, f"{self.bits_per_weight:.2f} bits a weight"])


def told(counts: Mapping[str, int]) -> str:
    """Return types and how many tensors are of each, as text."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def gguf_contents(path: Path) -> GgufContents:
    """Return what a GGUF file promises and holds; errors are those of `read_header`."""
    header = read_header(path)
    records = list(header.tensors.values())
    promised = file_type_names().get(header.keys.get(FILE_TYPE))
    named = type_in_name(Path(path).stem)
    block = block_of_file_type(promised or named)
    num_bytes = Counter()
    for one in records:
        num_bytes[one.type_name.upper()] += one.num_bytes
    order = [name for name, _ in num_bytes.most_common()]
    counts = Counter(one.type_name.upper() for one in records)
    fallen = [one for one in records if len(one.shape) > 1 and one.shape[-1] % block]
    odd = Counter(one.type_name.upper() for one in fallen)
    num_weights = sum(math.prod(one.shape) for one in records)
    return GgufContents(
        file_bytes=Path(path).stat().st_size,
        promised=promised,
        named=named,
        types={name: counts[name] for name in order},
        fallbacks={name: odd[name] for name in order if odd[name]},
        odd_rows=tuple(sorted({one.shape[-1] for one in fallen})),
        bits_per_weight=8 * num_bytes.total() / max(1, num_weights),
    )


def file_type_names() -> dict[int, str]:
    """Return the name of each file type by its number."""
    import gguf

    ours = {kind.file_type: name.upper() for name, kind in BLOCK_TYPES.items()}
    told = {int(kind): re.sub("^(MOSTLY|ALL)_", "", kind.name) for kind in gguf.LlamaFileType}
    return {number: name for number, name in (ours | told).items() if name != "GUESSED"}


def type_in_name(stem: str) -> str | None:
    """Return the file type that a file's name holds, the longest where several do."""
    found = [
        name
        for name in file_type_names().values()
        if re.search(rf"(?<![A-Z0-9]){name}(?![A-Z0-9_])", stem.upper())
    ]
    return max(found, key=len, default=None)


def block_of_file_type(name: str | None) -> int:
    """Return the weights in a block of the type that a file type is named after; 1 for none.

    Q3_K_M is a mixture around Q3_K; IQ3_M one of types that begin with IQ3, whose blocks are equal.
    """
    if name is None:
        return 1
    types = {one.upper(): one for one in type_names().values()}
    family = name.rpartition("_")[0]
    for wanted in (name, family, *(one for one in types if family and one.startswith(family))):
        if wanted in types:
            return block_sizes(types[wanted])[0]
    return 1


@torch.no_grad()
def read_gguf_model(path: Path, base: Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the model in a GGUF file, whoever wrote it, on the CPU, in eval mode, frozen.

    Args:
        path: A .gguf file of the base model's architecture and sizes.
        base: Folder of the full-precision model, of which only the config is read.
        dtype: Of the model's weights; they are dequantized in float32 and then rounded to it.

    Raises:
        ValueError: If the file is damaged or of another model; nothing that the base model has may
            be absent, of another shape or not finite, and nothing else may be there.
    """
    header, config = read_header(path), read_model_config(base)
    config.tie_word_embeddings = HEAD not in header.tensors
    require_same_model(path, header, config)
    model = empty_model_of(config, dtype)
    parameters = sources(model)
    names = file_names(config, parameters)
    if odd := sorted(set(names.values()) ^ (header.tensors.keys() - rope_tensors(config).keys())):
        where = "in the file only" if odd[0] in header.tensors else "not in the file"
        raise ValueError(f"{path} is of another model than {base}: {odd[0]} is {where}; {REMEDY}")
    for source, parameter in parameters.items():
        record = header.tensors[names[source]]
        if record.shape != parameter.shape:
            raise ValueError(
                f"{path} is of another model than {base}: {names[source]} is "
                f"{record.shape}, not {tuple(parameter.shape)}; {REMEDY}"
            )
        found = read_weight(path, record)
        if not found.isfinite().all():
            raise ValueError(
                f"{path}: {names[source]} holds infinite values or NaN; fetch or make it again"
            )
        if source.endswith("norm.weight"):
            found = found - FAMILIES[config.model_type].norm_offset
        order = row_order(config, source)
        parameter.copy_(found if order is None else found[order.argsort()])
    widen_attention(model)
    return model.eval().requires_grad_(False)


def require_same_model(path: Path, header: Header, config: PreTrainedConfig) -> None:
    """Refuse a file that says other things of its model than shapes tell; absent keys agree."""
    import gguf

    kind = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[require_family(config).name]]
    expected = {
        "general.architecture": kind,
        f"{kind}.attention.head_count": config.num_attention_heads,
        f"{kind}.attention.head_count_kv": config.num_key_value_heads,
        f"{kind}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{kind}.rope.freq_base": rope_of(config)["rope_theta"],
    }
    for key, value in expected.items():
        found = header.keys.get(key, value)
        is_equal = found == value or (
            not isinstance(found, str) and math.isclose(found, value, rel_tol=1e-6)
        )
        if not is_equal:
            raise ValueError(
                f"{path} is of another model: its {key} is {found}, not {value}; {REMEDY}"
            )
