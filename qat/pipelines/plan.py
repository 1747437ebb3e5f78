"""What a plan gives each tensor of a model, and how large the file gets."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qat.export.gguf_size import planned_file_bytes
from qat.model.architectures import SHAPES, read_architecture, without_rank
from qat.model.checkpoint import empty_model, empty_model_of
from qat.model.load import model_folder
from qat.model.surgery import model_tensors
from qat.pipelines.place import Place
from qat.pipelines.planned_hours import Forecast, predict_hours
from qat.pipelines.planned_memory import GIB, ModelSizes, Situation, predict_memory
from qat.pipelines.quantize_config import PlanConfig
from qat.quant.plan import QuantPlan, read_plan
from qat.runtime.device import dtype_name
from qat.storage.files import write_json
from qat.tracking.messages import say


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
    kv_cache_bytes: int | None
    """Of one sequence of the model's full length in a runtime, in float16; None without --memory
    and --tokens."""
    memory: dict[str, int] | None
    """Predicted peak bytes of one process of each command; None without --memory."""
    hours: dict[str, Forecast] | None
    """Of training on so many tokens, by accelerator; None without --tokens."""


def plan(config: PlanConfig) -> PlanResult:
    """Make a plan for a model from its config alone, print its table, save it where asked."""
    if is_shape := config.model in SHAPES and not Path(config.model).exists():
        shape, _ = without_rank(read_architecture(config.model))  # files hold its factors' product
        model = empty_model_of(shape, device="meta")
    else:
        model = empty_model(model_folder(config.model), device="meta")
    found = read_plan(config.plan, model_tensors(model))
    file_bytes = found.file_bytes
    if config.to == "gguf":
        if is_shape:
            raise ValueError(
                f"--to gguf counts a tokenizer and {config.model} has none; give a folder, or "
                "leave it out"
            )
        folder = model_folder(config.model)
        file_bytes = planned_file_bytes(model.config, found, text_source=folder)
    print_table(found, file_bytes)
    sizes = ModelSizes.of(model, found) if config.memory or config.tokens else None
    if config.save is not None:
        write_json(config.save, found.to_dict())
    return PlanResult(
        plan=found.name,
        file_bytes=file_bytes,
        tensor_bytes=found.file_bytes,
        weights=found.num_weights,
        bits_per_weight_model=round(8 * found.file_bytes / found.num_weights, 4),
        rows=found.rows(),
        kv_cache_bytes=sizes and sizes.kv_cache_bytes,
        memory=planned_memory(config, sizes) if config.memory else None,
        hours=planned_hours(config, sizes) if config.tokens else None,
    )


def planned_memory(config: PlanConfig, sizes: ModelSizes) -> dict[str, int]:
    """Predict the memory of each command, print it on standard error with what is assumed."""
    place = Place.of(config)
    one = Situation.on(place, batch_size=config.batch_size, seq_len=config.seq_len)
    memory = predict_memory(sizes, one)
    if config.processes > 1:
        for name, is_split in (("train, copies", False), ("train, --shard", True)):
            there = replace(one, num_processes=config.processes, is_split=is_split)
            memory[f"{name} on {config.processes}"] = predict_memory(sizes, there)["train"]
    total = place.device.total_bytes()
    table = Table(title=f"peak memory on {place.device.torch_device}", title_justify="left")
    table.add_column("command")
    for name in ("bytes", "GiB", "of the device"):
        table.add_column(name, justify="right")
    for mode, count in memory.items():
        share = f"{count / total:.0%}" if total else ""
        table.add_row(mode, f"{count:,}", f"{count / GIB:.2f}", share)
    table.add_section()
    kv = sizes.kv_cache_bytes
    table.add_row(
        f"KV cache of {sizes.context:,} tokens, float16", f"{kv:,}", f"{kv / GIB:.2f}", ""
    )
    Console(stderr=True).print(table)
    say(assumptions(config, place))
    return memory


def planned_hours(config: PlanConfig, sizes: ModelSizes) -> dict[str, Forecast]:
    """Predict the hours of training on accelerators, print them with what is assumed."""
    there = Situation(dtype=torch.bfloat16, batch_size=config.batch_size, seq_len=config.seq_len)
    found = predict_hours(sizes, there, config.tokens, config.mfu)
    table = Table(title=f"{config.tokens:,.0f} tokens", title_justify="left")
    table.add_column("device")
    for name in ("pretrain", "distil", "build-cache"):
        table.add_column(f"{name}, hours", justify="right")
    for name in ("pretrain", "distil"):
        table.add_column(f"{name}, GB of a chip", justify="right")
    for name, one in found.items():
        hours = (one.pretrain_hours, one.distil_hours, one.cache_hours)
        memory = (one.pretrain_bytes, one.distil_bytes)
        table.add_row(
            name,
            *(f"{value:.3g}" for value in hours),
            *(f"{value / 1e9:.1f} of {one.memory / 1e9:.0f}" for value in memory),
        )
    Console(stderr=True).print(table)
    say(
        f"assumed: {config.mfu:.0%} of the makers' peak rates in 16 bits, batches of "
        f"{config.batch_size} x {config.seq_len} tokens on all chips together, no gradient "
        "checkpointing; of several chips each holds rows of the weights. Nothing of this table was "
        "measured"
    )
    return found


def assumptions(config: PlanConfig, place: Place) -> str:
    """Return on one line what a prediction of memory takes for granted."""
    return (
        f"assumed: {dtype_name(place.dtype)}, batches of {config.batch_size} x {config.seq_len} "
        "tokens; quantize by moments, not measured; all layers train, their weights and scales, by "
        "AdamW, with states saved on the way; a feed-forward part and attention as Llama has them"
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
