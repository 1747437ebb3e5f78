"""All that a killed run needs to resume as if it had not been killed.

state/state.pt holds trained parameters, optimizer, loss scale and random generators;
state/state.json the position and the sha256 of the other. Both are in one folder that is replaced
in one rename.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.runtime.device import random_state, set_random_state
from qat.storage import files
from qat.storage.decode import Count, as_type, read_as, reading
from qat.train.step import Trainer

STATE = "state"


@dataclass(kw_only=True, slots=True)
class Progress:
    """Where a run stands."""

    step: Count = 0
    """Optimizer steps taken."""
    tokens_seen: Count = 0
    seconds: float = 0.0
    """Time spent in training, earlier processes included."""
    best_kl_nats: float | None = None
    best_kl_nats_lower: float | None = None
    """In its place where the cache keeps a part of the vocabulary."""
    best_perplexity: float | None = None
    """In its place where there is no teacher."""
    best_step: int | None = None
    last_loss: float | None = None
    smooth_loss: float | None = None
    rollbacks: Count = 0
    """Times that the run went back to a state after its loss jumped; each halves the rate."""
    last_eval: dict[str, Any] = field(default_factory=dict)


def write_state(folder: Path, progress: Progress, trainer: Trainer) -> None:
    """Write the state of a run; the previous one stays until this one is whole."""
    model, ema, scaler = trainer.model, trainer.ema, trainer.scaler
    trained = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    with files.atomic_folder(Path(folder) / STATE) as temporary:
        path = temporary / "state.pt"
        save(
            {
                "trained": trained,
                "optimizer": on_cpu(trainer.optimizer.state_dict()),
                "random": random_state(trainer.device),
                "scaler": scaler.state_dict() if scaler else {},
                "ema": [average.cpu() for average in ema.averages] if ema else [],
            },
            path,
        )
        files.write_json(
            temporary / "state.json", asdict(progress) | {"sha256": files.sha256_of_file(path)}
        )


def on_cpu(value: object) -> object:
    """Return nested values with every tensor on the CPU, where any machine can read it."""
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [on_cpu(item) for item in value]
    return value.cpu() if isinstance(value, Tensor) else value


def save(values: dict[str, Any], path: Path) -> None:
    """Write a state file."""
    try:
        torch.save(values, path)
    except RuntimeError as error:  # how torch reports a write that failed
        why = str(error).splitlines()[0]
        raise OSError(
            f"{path.parent.parent} has no space for the state to resume from ({why}); free some "
            "space and run the same command again"
        ) from error


def has_state(folder: Path) -> bool:
    """Return whether a run left a state to resume from."""
    files.recover_interrupted_replace(Path(folder) / STATE)
    return (Path(folder) / STATE / "state.json").is_file()


@torch.no_grad()
def read_state(folder: Path, trainer: Trainer) -> Progress:
    """Put a run's state back into its model, optimizer and random generators."""
    path = Path(folder) / STATE / "state.pt"
    remedy = f"remove {path.parent} to start over"
    values = read_as(path.with_name("state.json"), dict[str, Any], remedy=remedy)
    recorded = values.pop("sha256", None)
    progress = as_type(values, Progress, path.with_name("state.json"), remedy=remedy)
    if files.sha256_of_file(path) != recorded:
        raise ValueError(f"{path} does not match its sha256; {remedy}")
    with reading(path, remedy):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        restore(state, trainer)
    return progress


def restore(state: dict[str, Any], trainer: Trainer) -> None:
    """Put what `write_state` took of a trainer back."""
    ema, optimizer = trainer.ema, trainer.optimizer
    parameters = dict(trainer.model.named_parameters())
    for name, tensor in state["trained"].items():
        copy_same(parameters[name], tensor)
    # Rates follow from the step, and how the optimizer works from the device, which may be another.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
    set_random_state(trainer.device, state["random"])
    if trainer.scaler is not None:
        trainer.scaler.load_state_dict(state["scaler"])
    for average, tensor in zip(ema.averages if ema else [], state["ema"], strict=True):
        copy_same(average, tensor)


def copy_same(target: Tensor, values: Tensor) -> None:
    """Copy a tensor of the same shape; others would be repeated where they can be."""
    if target.shape != values.shape:
        raise ValueError(f"a tensor has shape {tuple(values.shape)}, not {tuple(target.shape)}")
    target.copy_(values)
