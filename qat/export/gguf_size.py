"""The bytes of the GGUF file that a plan comes to, known without any weight."""

from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedConfig

from qat.export.gguf_file import ALIGNMENT
from qat.export.gguf_keys import PlannedTensor, rope_tensors, write_head
from qat.export.gguf_vocabulary import read_vocabulary
from qat.export.to_gguf import FILE_NAME, file_names, require_type
from qat.model.load import load_tokenizer
from qat.quant.plan import QuantPlan
from qat.quant.spec import TensorSpec


def planned_file_bytes(config: PreTrainedConfig, plan: QuantPlan, *, text_source: Path) -> int:
    """Return the bytes of a plan's GGUF file: tensors, keys, tokenizer and padding."""
    names = file_names(config, plan.specs)
    vocabulary = read_vocabulary(load_tokenizer(text_source), config.vocab_size)
    tensors = [
        PlannedTensor(source, names[source], planned_type(source, spec), plan.shapes[source])
        for source, spec in plan.specs.items()
    ]
    with TemporaryDirectory() as folder:
        path = Path(folder) / FILE_NAME
        write_head(path, config, vocabulary, tensors)
        head_bytes = path.stat().st_size
    sizes = [tensor.num_bytes for tensor in tensors]
    sizes += [factors.nbytes for factors in rope_tensors(config).values()]
    return sum(padded(size) for size in (head_bytes, *sizes))


def padded(num_bytes: int) -> int:
    """Return a number of bytes rounded up to the file's alignment."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def planned_type(source: str, spec: TensorSpec) -> str:
    """Return the type of a tensor in the file."""
    return require_type(source, spec) if spec.is_quantized else spec.name
