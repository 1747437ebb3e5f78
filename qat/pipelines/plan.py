"""What a plan gives each tensor of a model, and how large the file gets."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from qat.export.gguf_size import planned_file_bytes
from qat.model.checkpoint import empty_model
from qat.model.load import model_folder
from qat.model.surgery import model_tensors
from qat.pipelines.quantize_config import PlanConfig
from qat.quant.plan import QuantPlan, read_plan
from qat.storage.files import write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanResult:
    """A plan of a model in numbers."""

    plan: str
    """As given."""
    file_bytes: int
    """Of the whole file, or of all tensors where no format was named."""
    tensor_bytes: int
    """Of all tensors."""
    weights: int
    """Number of parameters; tied ones count once."""
    bits_per_weight_model: float
    """8 * tensor_bytes / weights."""
    rows: list[dict[str, Any]]
    """The table: tensors, count, format, bits_per_weight, bytes, share."""


def plan(config: PlanConfig) -> PlanResult:
    """Make a plan for a model from its config alone, print its table, save it where asked."""
    folder = model_folder(config.model)
    model = empty_model(folder, device="meta")
    found = read_plan(config.plan, model_tensors(model))
    file_bytes = found.file_bytes
    if config.to == "gguf":
        file_bytes = planned_file_bytes(model.config, found, text_source=folder)
    print_table(found, file_bytes)
    if config.save is not None:
        write_json(config.save, found.to_dict())
    return PlanResult(
        plan=found.name,
        file_bytes=file_bytes,
        tensor_bytes=found.file_bytes,
        weights=found.num_weights,
        bits_per_weight_model=round(8 * found.file_bytes / found.num_weights, 4),
        rows=found.rows(),
    )


def print_table(plan: QuantPlan, file_bytes: int) -> None:
    """Print the formats, bytes and shares of a plan's tensors on standard error."""
    table = Table(title=f"plan {plan.name}", title_justify="left")
    for name in ("tensors", "format"):
        table.add_column(name)
    for name in ("count", "bits", "bytes", "share"):
        table.add_column(name, justify="right")
    for row in plan.rows():
        table.add_row(
            row["tensors"],
            row["format"],
            str(row["count"]),
            f"{row['bits_per_weight']:.3f}",
            f"{row['bytes']:,}",
            f"{row['bytes'] / file_bytes:.1%}",
        )
    rest = file_bytes - plan.file_bytes
    if rest:
        table.add_row(
            "keys, tokenizer, padding", "", "", "", f"{rest:,}", f"{rest / file_bytes:.1%}"
        )
    bits = 8 * file_bytes / plan.num_weights
    table.add_section()
    table.add_row("file", "", str(len(plan.specs)), f"{bits:.3f}", f"{file_bytes:,}", "100%")
    Console(stderr=True).print(table)
