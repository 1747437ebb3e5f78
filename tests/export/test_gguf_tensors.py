"""Files are written and compared some rows at a time, never whole tensors at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qat.export import gguf_tensors
from qat.export.gguf_keys import PlannedTensor
from qat.export.gguf_tensors import TensorRows
from qat.export.to_gguf import export_to_gguf
from tests.tiny import LargestTensor, quantize_plainly, save_tiny, tiny_llama, tiny_model

GROWTH = """
import sys
from pathlib import Path
import torch
from qat.export.to_gguf import export_to_gguf
from tests.tiny import save_tiny, tiny_llama

def kibibytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

folder = Path(sys.argv[1])
torch.set_default_dtype(torch.bfloat16)
sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
model = tiny_llama(vocab_size=32768, head_dim=256, **sizes)
folder = save_tiny(folder / "base", tiny_llama())
text_source, output = folder, folder.parent / "a.gguf"
export_to_gguf(tiny_llama(), folder.parent / "warm.gguf", text_source=folder, dtype=torch.half)
(folder.parent / "export.json").unlink()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = kibibytes("VmRSS")
export_to_gguf(model, output, text_source=folder, dtype=torch.float16)
print((kibibytes("VmHWM") - before) * 1024, output.stat().st_size)
"""


@pytest.mark.recipe
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_no_tensor_larger_than_a_chunk_is_made(tmp_path, monkeypatch, dtype):
    """Embedding and linears of the student are 64 and 8 times a chunk."""
    monkeypatch.setattr(gguf_tensors, "CHUNK_WEIGHTS", 1024)
    student = tiny_llama(vocab_size=1024, attention_bias=True)
    folder = save_tiny(tmp_path / "base", student)
    quantize_plainly(student, "all=gguf:q4_0, embed=gguf:q8_0")
    with LargestTensor() as largest:
        report = export_to_gguf(student, tmp_path / "a.gguf", text_source=folder, dtype=dtype)
    assert report["exact"] is True
    assert largest.num_bytes <= 1024 * 8  # float64 measures what rounding costs


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_chunks_together_are_the_tensor(tmp_path, monkeypatch, family):
    """In the file's order, whatever the size of a chunk."""
    model = tiny_model(family, num_hidden_layers=1)
    monkeypatch.setattr(gguf_tensors, "CHUNK_WEIGHTS", 300)
    for source, parameter in model.named_parameters():
        tensor = PlannedTensor(source, source, "f32", tuple(parameter.shape))
        rows = TensorRows(model, tensor)
        found = torch.cat([rows.weights(chunk) for chunk in rows.chunks()])
        expected = parameter + (1.0 if family == "gemma3" and parameter.dim() == 1 else 0.0)
        order = gguf_tensors.row_order(model.config, source)
        expected = expected if order is None else expected[order]
        assert torch.equal(found.view_as(expected), expected), source


@pytest.mark.recipe
def test_memory_grows_by_far_less_than_the_file(tmp_path):
    """A model of 90 million weights in bfloat16, written in float16."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peaks of memory are read from Linux' /proc")
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    growth, file_bytes = map(int, done.stdout.split())
    assert file_bytes > 1.5e8
    assert growth < file_bytes / 2
