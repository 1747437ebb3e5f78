"""Files of llama.cpp's own quantizer, from the same model and the same calibration text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from qat.cache.read import TeacherCache
from qat.calibrate.statistics import collect_second_moments
from qat.export.config import ExportConfig
from qat.export.llama_quantize import find_quantizer, quantize_file, write_importance_matrix
from qat.export.to_gguf import file_names
from qat.model.load import load_dense
from qat.pipelines.compress_stages import Source
from qat.pipelines.export import export
from qat.pipelines.quantize import spread_batches
from qat.tracking.messages import say

MOST_TOKENS = 8192  # whose inputs weigh the errors; second moments are known from few
EMBEDDING = "iq4_nl"
DENSE = "f16.gguf"
IMPORTANCE = "importance.dat"


@dataclass(frozen=True, kw_only=True, slots=True)
class StockType:
    """A type of all matrices but the embedding."""

    name: str
    """Such as IQ4_NL."""
    embedding: str
    """Type of the token embedding."""

    @classmethod
    def listed(cls, text: str) -> "list[StockType]":
        """Return what TYPE or TYPE/EMBEDDING, joined by commas, stand for.

        IQ4_NL is llama.cpp's smallest embedding for rows that are no multiple of 256; its own
        choice, Q6_K or Q8_0, makes files of small models larger and no better for their size.
        """
        pairs = (one.strip().partition("/") for one in text.split(",") if one.strip())
        return [cls(name=name.upper(), embedding=of or EMBEDDING) for name, _, of in pairs]


def stock_files(
    types: Sequence[StockType], source: Source, cache: TeacherCache, folder: Path
) -> list[Path]:
    """Make the file of each type in a folder, or find it there.

    Raises:
        ValueError: If llama.cpp's quantizer is not installed, or fails.
    """
    find_quantizer()
    dense, importance, made = source.work / DENSE, source.work / IMPORTANCE, []
    for one in types:
        path = folder / f"{Path(source.config.model).name}-{one.name}.gguf"
        made.append(path)
        if path.is_file():
            continue
        if not dense.is_file():
            checkpoint = source.config.model
            export(ExportConfig(checkpoint=checkpoint, to="gguf", dtype="fp16", output=dense))
        if not importance.is_file():
            write_importance_matrix(importance, input_moments(source, cache))
        folder.mkdir(parents=True, exist_ok=True)
        say(f"llama.cpp makes {path}")
        quantize_file(dense, path, one.name, embedding_type=one.embedding, importance=importance)
    dense.unlink(missing_ok=True)
    return made


def input_moments(source: Source, cache: TeacherCache) -> dict[str, Tensor]:
    """Return the mean square of each linear's inputs by the weight's name in a GGUF file."""
    model = load_dense(source.config.model, dtype=source.place.dtype)
    names = file_names(model.config, [name for name, _ in model.named_parameters()])
    head = model.get_output_embeddings()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    owner = model.get_input_embeddings() if model.config.tie_word_embeddings else head
    head_name = next(name for name, module in model.named_modules() if module is owner)
    device = source.place.device.eager()
    batches = spread_batches(cache, max(1, MOST_TOKENS // cache.seq_len))
    with device.hosting(model):
        placed = (batch.to(device.torch_device) for batch in batches)
        moments = collect_second_moments(model, linears, placed, head=head_name)
    return {names[f"{name}.weight"]: moment.cpu() for name, moment in moments.items()}
