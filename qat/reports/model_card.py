"""The README.md of an exported folder: what it is, how close, how it was made, how to load it."""

from pathlib import Path
from typing import Any

from qat.model.checkpoint import CheckpointHeader
from qat.reports.compare import Table, markdown_table
from qat.storage.decode import object_in
from qat.storage.files import write_text

CARD_NAME = "README.md"
SUMMARY_NAME = "summary.json"  # of a run, next to its best and final students

TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```"""
PLUGIN = """Install the `qat` package first: the folder has a model type of its own, so transformers
without the plugin stops with an error instead of loading random weights.

```python
import qat.export.plugin
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```"""
GGUF = """```
llama-cli -m PATH -p "What is a lake?"
```

```python
from llama_cpp import Llama

print(Llama("PATH")("What is a lake?")["choices"][0]["text"])
```

The type Q2_0 needs llama.cpp of 2026-07 or newer. Do not send the file through `llama-quantize`:
it fits scales anew and loses what was trained. Kernels round activations to 8 bits, which costs
about 0.004 nats; the weights are those that were trained, to the bit."""
MLX = """```python
from mlx_lm import generate, load

model, tokenizer = load("PATH")
print(generate(model, tokenizer, prompt="What is a lake?"))
```"""
COMPRESSED = f"""With the `compressed-tensors` package installed:

{TRANSFORMERS}

Where MLP and attention have different bits, leave `CompressedTensorsConfig(dequantize=True)` out:
transformers 5.23 then reads all layers with the bits of the first group.

vLLM: `vllm serve PATH`."""
COREML = """The package holds one linear a layer, its weight as palette, indices and scales.

```python
import coremltools

model = coremltools.models.MLModel("PATH/linears.mlpackage")
```"""
LOADING = {
    "hf": TRANSFORMERS,
    "hf-quantized": PLUGIN,
    "gguf": GGUF,
    "mlx": MLX,
    "compressed-tensors": COMPRESSED,
    "coreml": COREML,
}
LIBRARY = {"gguf": "gguf", "mlx": "mlx", "coreml": "coreml"}  # others: transformers


def write_card(
    report: dict[str, Any],
    header: CheckpointHeader | None,
    checkpoint: Path,
    *,
    target: str,
    dtype: str | None,
    output: Path,
) -> Path:
    """Write the card into an exported folder, or next to a single file under its name; return it.

    Args:
        report: What the export says, with the student's bits per weight.
        header: Of the student; None for a full-precision model.
        checkpoint: Where the student is; a run's summary next to it is quoted.
        target: The format.
        dtype: Of dense parts, None where not asked for.
        output: Where the export is.
    """
    path = output / CARD_NAME if output.is_dir() else output.with_suffix(".md")
    loaded_from = output / report["file"] if output.is_dir() and "file" in report else output
    told = facts(target, header, report, training_of(checkpoint))
    known = [fact for fact in told.items() if fact[1] is not None]
    sections = [
        front_matter(target, header),
        f"# {output.stem}",
        introduction(target, dtype, header),
        markdown_table(Table(["what", "value"], [list(fact) for fact in known])),
        "## How to load it",
        LOADING[target].replace("PATH", str(loaded_from.name)),
    ]
    write_text(path, "\n\n".join(sections) + "\n")
    return path


def front_matter(target: str, header: CheckpointHeader | None) -> str:
    """Return the lines that model hubs read."""
    base = header.base_model.get("name") if header else None
    lines = [f"base_model: {base}", "base_model_relation: quantized"] if base else []
    lines += [f"library_name: {LIBRARY.get(target, 'transformers')}"]
    lines += ["pipeline_tag: text-generation", "tags: [quantized, distillation]"]
    return "\n".join(["---", *lines, "---"])


def introduction(target: str, dtype: str | None, header: CheckpointHeader | None) -> str:
    """Return one sentence that says what the files are."""
    if header is None or dtype is not None and target in ("gguf", "hf"):
        return f"Dense weights in {dtype or 'fp32'}, as reference for packed files."
    return (
        f"{header.base_model.get('name', 'A model')}, quantized with plan "
        f"{header.plan['name']} and distilled; every quantized weight in these files equals the "
        "trained one to the bit (`export.json`)."
    )


def facts(
    target: str,
    header: CheckpointHeader | None,
    report: dict[str, Any],
    training: dict[str, Any],
) -> dict[str, Any]:
    """Return what the card's table shows, in order; None where it is not known."""
    metrics = header.metrics if header else {}
    head = report.get("head") or {}
    return {
        "base model": header and header.base_model.get("name"),
        "plan": header and header.plan["name"],
        "format": target,
        "bits per weight, quantized layers": report.get("bits_per_weight"),
        "bits per weight, MLP": report.get("bits_per_weight_mlp"),
        "bits per weight, whole model": report.get("bits_per_weight_model"),
        "bytes": report.get("file_bytes"),
        "embeddings and head": head.get("type"),
        "noise of embeddings and head (SQNR, dB)": head.get("sqnr_db"),
        "KL to the teacher, held out (nats)": metrics.get("kl_nats"),
        "KL to the teacher, held out, lower bound (nats)": metrics.get("kl_nats_lower"),
        "perplexity, held out": metrics.get("perplexity"),
        "top-1 agreement": metrics.get("top1_agreement"),
        "training tokens": training.get("tokens_seen"),
        "training seconds": training.get("seconds"),
        "cache": header and header.cache_fingerprint,
        "tensors compared with the student": report["tensors_compared"],
    }


def training_of(checkpoint: Path) -> dict[str, Any]:
    """Return the summary of the run that a student came from; empty where there is none."""
    path = checkpoint.parent / SUMMARY_NAME
    found = object_in(path) if path.is_file() else {}
    return found if "tokens_seen" in found else {}
