"""All that a killed run needs to resume as if it had not been killed, in any number of processes.

state/step_N/*.distcp     trained parameters, optimizer, averages, random generators: each process
                          writes a part, named so that any other may read it
state/step_N/index.json   which tensor is where
state/step_N/state.json   the position and the sha256 of the files; comes last, so that a folder
                          with it is whole

Until the next update changes what a state holds, it is copied to memory of the host that is kept
for the next one; from there it is written while training goes on.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as futures_wait
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.runtime import distributed
from qat.runtime.device import is_traced, random_state, set_random_state
from qat.runtime.launch import is_first, rank
from qat.storage import files
from qat.storage.decode import Count, as_type, read_as, reading
from qat.train.step import Trainer

STATE = "state"
POSITION, INDEX = "state.json", "index.json"
OLD_FILE = "state.pt"  # of version 0.1.0


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


class StateWriter:
    """Saves a run's states, and removes those that are not to be kept."""

    def __init__(self, run: Path, *, keep: int = 1, keep_every: int = 0):
        """Keep the last so many states, and those of every so many steps (0 = none)."""
        self.folder, self.keep, self.keep_every = Path(run) / STATE, keep, keep_every
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="state")
        self.saving: Future[None] | None = None
        self.copying: Future[None] | None = None
        self.stager: distributed.DefaultStager | None = None

    def __enter__(self) -> "StateWriter":
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        """Wait for a state that was begun; what ends the run tells more than why it failed."""
        with suppress(OSError, RuntimeError) if kind else nullcontext():
            self.wait()
        self.executor.shutdown()
        if self.stager:
            self.stager.close()

    def save(
        self, progress: Progress, trainer: Trainer, then: Callable[[], None] | None = None
    ) -> None:
        """Begin to save a state: what trains may change again after `wait_for_copy`.

        `Trainer.step` calls that before its update.

        Args:
            progress: Where the run stands.
            trainer: What it trains.
            then: Called when the state is whole, while training goes on.

        Raises:
            OSError: If the one before could not be saved; the last whole one stays.
        """
        self.wait()
        folder = self.folder / state_name(progress.step)
        distributed.from_first(partial(remove_broken, self.folder, folder))
        self.stager = self.stager or distributed.open_stager(trainer.device)
        self.copying, saving = distributed.start_saving(own_tensors(trainer), folder, self.stager)
        trainer.before_update = self.wait_for_copy
        scaler = trainer.scaler.state_dict() if trainer.scaler else {}
        position = asdict(progress) | {"scaler": scaler}
        self.saving = self.executor.submit(self.finish, saving, folder, position, then)

    def wait_for_copy(self) -> None:
        """Return when the state that was begun is copied; whether it could be, `wait` tells."""
        copying, self.copying = self.copying, None
        if copying is not None:
            futures_wait([copying])

    def wait(self) -> None:
        """Return when the state that was begun is whole.

        Raises:
            OSError: If it could not be saved.
        """
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.result()

    def finish(
        self,
        saving: Future[object],
        folder: Path,
        position: dict[str, Any],
        then: Callable[[], None] | None,
    ) -> None:
        """Declare a state whole when all processes have written it."""
        try:
            distributed.saved(saving)
            if is_first():
                files.write_json(folder / INDEX, distributed.take_index(folder))
                sums = {file.name: files.sha256_of_file(file) for file in sorted(folder.iterdir())}
                files.write_json(folder / POSITION, position | {"sha256": sums})
                self.remove_old()
        except OSError as error:
            run, what, why = folder.parent.parent, "the state to resume from", str(error)
            if files.is_disk_full(error):
                told = f"{run} has no space for {what} ({why}); free some space and"
            else:
                told = f"{run}: {what} could not be saved ({why}); the one before is whole:"
            raise OSError(f"{told} run the same command again") from error
        if then is not None:
            then()

    def remove_old(self) -> None:
        """Remove states but the last ones and those of every so many steps."""
        for path in whole_states(self.folder)[: -self.keep]:
            step = int(path.name.removeprefix("step_"))
            if not self.keep_every or step % self.keep_every:
                remove(path)


def write_state(run: Path, progress: Progress, trainer: Trainer) -> None:
    """Save a state of a run and wait for it."""
    with StateWriter(run) as writer:
        writer.save(progress, trainer)


def remove_broken(folder: Path, again: Path | None = None) -> None:
    """Remove states that were not written to their end, and one that is written again."""
    for path in folder.glob("step_*"):
        if path == again or not (path / POSITION).is_file():
            remove(path)


def remove(folder: Path) -> None:
    """Remove a state; killed in between, it is none."""
    (folder / POSITION).unlink(missing_ok=True)
    shutil.rmtree(folder)


def whole_states(folder: Path) -> list[Path]:
    """Return the folders of a run's whole states, the last one last."""
    return sorted(path.parent for path in Path(folder).glob(f"step_*/{POSITION}"))


def own_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Return what this process writes of a state, by name: its share, and its generators' states.

    Of tensors that every process has each copies and writes some, of the others all write rows.
    """
    tensors = state_tensors(trainer)
    split = {name: tensor for name, tensor in tensors.items() if distributed.is_part(tensor)}
    names = [name for name in tensors if name not in split]
    own = {names[place]: tensors[names[place]] for place in distributed.share(range(len(names)))}
    found = own | split | random_tensors(trainer.device)
    return dict(sorted(found.items()))  # one order, whatever the optimizer's is after it was read


def state_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Return parameters, optimizer state and averages by name; traced ones on the host."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    found: dict[str, Tensor] = {}

    def add(kind: str, parameter: Tensor, values: Tensor) -> None:
        rows = trainer.split.get(parameter)
        is_split = rows is not None and values.dim() > 0
        found[f"{kind}.{names[parameter]}"] = (
            distributed.as_part(values, rows) if is_split else values
        )

    for parameter in trainer.parameters:
        add("trained", parameter, parameter.detach())
        for key, values in stored_state(trainer.optimizer, parameter).items():
            add(f"optimizer.{key}", parameter, values)
    if trainer.ema:
        for parameter, average in zip(trainer.ema.parameters, trainer.ema.averages, strict=True):
            add("average", parameter, average)
    is_far = is_traced(trainer.device)
    return {name: value.cpu() for name, value in found.items()} if is_far else found


def stored_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return what an optimizer keeps of a parameter, as plain tensors."""
    state = optimizer.state.get(parameter, {})
    if isinstance(optimizer, torch.optim.AdamW):
        return state
    from qat.train.adamw_8bit import stored_averages  # takes torchao

    return stored_averages(state)


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """Return the states of this process's random generators by name."""
    states = random_state(device).items()
    return {f"random.{rank()}.{kind}": state for kind, state in states}


def has_state(run: Path) -> bool:
    """Return whether a run left a state to resume from; remove what a kill left of others.

    Raises:
        ValueError: If it is one of an earlier version.
    """
    folder = Path(run) / STATE
    if (folder / OLD_FILE).is_file():
        raise ValueError(
            f"{folder / OLD_FILE} is of an earlier version, which resumes it; remove {folder} to "
            "start over with this one"
        )
    remove_broken(folder)
    return bool(whole_states(folder))


def state_name(step: int) -> str:
    """Return the name of a state's folder."""
    return f"step_{step:07d}"


@torch.no_grad()
def read_state(run: Path, trainer: Trainer) -> Progress:
    """Put a run's last state back into its model, optimizer and random generators.

    Raises:
        ValueError: If a file is not the one that was written.
    """
    folder = whole_states(Path(run) / STATE)[-1]
    remedy = f"remove {folder} to resume from the state before it, or to start over"
    values = distributed.from_first(partial(checked_position, folder, remedy))
    scaler = values.pop("scaler", {})
    progress = as_type(values, Progress, folder / POSITION, remedy=remedy)
    if state_name(progress.step) != folder.name:  # beyond the last step a run would never end
        raise ValueError(f"{folder / POSITION} says step {progress.step}; {remedy}")
    with reading(folder, remedy):
        restore(folder, trainer, scaler)
    return progress


def restore(folder: Path, trainer: Trainer, scaler: dict[str, Any]) -> None:
    """Put what a folder holds back into a trainer and the random generators."""
    index: dict[str, Any] = files.read_json(folder / INDEX)
    sizes = distributed.saved_sizes(index)
    generators = random_tensors(trainer.device).keys()
    wanted = [name for name in sizes if not name.startswith("random.") or name in generators]
    tensors = {name: room_for(trainer, name, *sizes[name]) for name in wanted}
    distributed.load_saved(tensors, folder, index)
    tensors = {name: distributed.own_part(tensor) for name, tensor in tensors.items()}
    put_back(trainer, tensors)
    if trainer.scaler is not None:
        trainer.scaler.load_state_dict(scaler)
    states = {name.rpartition(".")[2]: tensors[name] for name in generators & tensors.keys()}
    if states:  # there are more processes than there were: those have draws of their own
        set_random_state(trainer.device, states)


def room_for(trainer: Trainer, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return what a saved tensor is read into: this process's rows where it has some of them."""
    split = {n: p for n, p in trainer.model.named_parameters() if p in trainer.split}
    owner = next((n for n in split if shape and name.endswith(f".{n}")), None)
    if owner is None:
        return torch.zeros(shape, dtype=dtype)
    rows = torch.zeros(split[owner].shape, dtype=dtype, device=trainer.device)
    return distributed.as_part(rows, shape[0])


def checked_position(folder: Path, remedy: str) -> dict[str, Any]:
    """Return what a state says of itself, after a look at every file's sha256."""
    values = read_as(folder / POSITION, dict[str, Any], remedy=remedy)
    sums = as_type(values.pop("sha256", None), dict[str, str], folder / POSITION, remedy=remedy)
    for path in folder.iterdir():
        if path.name != POSITION and files.sha256_of_file(path) != sums.pop(path.name, None):
            raise ValueError(f"{path} does not match its sha256; {remedy}")
    if sums:
        raise ValueError(f"{folder} lacks {min(sums)}; {remedy}")
    return values


def put_back(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    """Copy a state's tensors into what trains, its averages and its optimizer."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    for parameter in trainer.parameters:
        copy_same(parameter, tensors[f"trained.{names[parameter]}"])
    if trainer.ema:
        for parameter, average in zip(trainer.ema.parameters, trainer.ema.averages, strict=True):
            copy_same(average, tensors[f"average.{names[parameter]}"])
    places = {names[parameter]: place for place, parameter in enumerate(trainer.parameters)}
    states: dict[int, dict[str, Tensor]] = {}
    for key in tensors:
        part, _, rest = key.partition(".")
        kind, _, name = rest.partition(".")
        if part == "optimizer":
            states.setdefault(places[name], {})[kind] = tensors[key]
    if not isinstance(trainer.optimizer, torch.optim.AdamW):
        from qat.train.adamw_8bit import read_averages  # takes torchao

        states = {place: read_averages(state) for place, state in states.items()}
    # Rates follow from the step, and how the optimizer works from the device, which may be another.
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": states, "param_groups": groups})


def copy_same(target: Tensor, values: Tensor) -> None:
    """Copy a tensor of the same shape; others would be repeated where they can be."""
    if target.shape != values.shape:
        raise ValueError(f"a tensor has shape {tuple(values.shape)}, not {tuple(target.shape)}")
    target.copy_(values)
