"""Files of ik_llama.cpp's quantizer, from the same model and the same calibration text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from qat.cache.read import TeacherCache
from qat.calibrate.statistics import collect_second_moments
from qat.export.config import ExportConfig
from qat.export.llama_quantize import find_quantizer, quantize_file, write_importance_matrix
from qat.export.to_gguf import file_names
from qat.model.load import load_dense
from qat.pipelines.compress_stages import Kept, Source
from qat.pipelines.export import export
from qat.pipelines.quantize import spread_batches
from qat.storage.decode import read_as
from qat.storage.files import fingerprint, write_json
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
    """Make the file of each type in a folder, or find it there; one that fails is left out.

    Raises:
        ValueError: If the quantizer is not installed.
    """
    find_quantizer()
    key = fingerprint([source.base["weights"], cache.fingerprint, MOST_TOKENS])
    name = Path(source.config.model).name
    paths = {folder / f"{name}-{one.name}-{one.embedding}.gguf": one for one in types}
    if missing := {path: one for path, one in paths.items() if not is_made(path, key)}:
        source.work.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".stock.", suffix=".part", dir=source.work) as temporary:
            dense, importance = Path(temporary) / DENSE, Path(temporary) / IMPORTANCE
            checkpoint = source.config.model
            export(ExportConfig(checkpoint=checkpoint, to="gguf", dtype="fp16", output=dense))
            write_importance_matrix(importance, input_moments(source, cache))
            for path, one in missing.items():
                try:
                    make_file(one, path, dense, importance, key)
                except (ValueError, OSError) as error:
                    say(f"left out: {error}")
    return [path for path in paths if is_made(path, key)]


def make_file(one: StockType, path: Path, dense: Path, importance: Path, key: str) -> None:
    """Write the file of a type, and beside it what it was made of."""
    say(f"ik_llama.cpp makes {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    quantize_file(dense, path, one.name, embedding_type=one.embedding, importance=importance)
    write_json(path.with_suffix(".json"), {"key": key})


def is_made(path: Path, key: str) -> bool:
    """Return whether a file is there that was made of the same model and text."""
    record = path.with_suffix(".json")
    return path.is_file() and record.is_file() and read_as(record, Kept).key == key


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
