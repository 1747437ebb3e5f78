"""Where a run's numbers go: its folder always, Weights & Biases and TensorBoard when asked.

A loop gets one callable, `track(step, values)`. Keys are those that Hugging Face users know:
`train/loss`, `train/learning_rate`, `train/grad_norm`, `eval/kl_nats`, ...
"""

import json
import math
import secrets
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from qat.storage.decode import read_as
from qat.storage.files import write_json
from qat.tracking.environment import add_session, describe_environment
from qat.tracking.record import SETTINGS, RunRecord

if TYPE_CHECKING:
    import wandb
    from torch.utils.tensorboard import SummaryWriter

WANDB_ID = "wandb.json"
TENSORBOARD = "tensorboard"  # the folder of event files in a run's folder
COMPARE = "compare"  # the kind of run that a comparison is sent as
STEP_KEY = "train/global_step"  # the x axis of the Hugging Face trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbId:
    """What keeps a run's id at Weights & Biases."""

    id: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_-]{1,64}\Z")]


class WandbSink:
    """A Weights & Biases run that continues under the same id when training resumes."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        project: str,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        resume: bool = False,
    ) -> None:
        """Start or continue the run; WANDB_MODE=offline and =disabled are heeded.

        The run's folder keeps the id, under which `resume` continues, and the offline files. Tags
        are sent again on resume, as the server has been seen to lose them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.run = start_wandb(
            id=run_id(folder / WANDB_ID, resume=resume),
            resume="allow",
            dir=str(folder),
            config=dict(config),
            project=project,
            name=name or folder.name,
            group=group,
            tags=list(tags),
            job_type="train",
        )
        self.run.define_metric(STEP_KEY)
        self.run.define_metric("*", step_metric=STEP_KEY, step_sync=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send one step; the server drops steps that it has, which a resumed run repeats."""
        self.run.log({**values, STEP_KEY: step}, step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Send the summary and wait until all is sent or stored."""
        self.run.summary.update(dict(summary))
        self.run.finish()


class TensorBoardSink:
    """TensorBoard's event files in a run's folder, under the same keys."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], *, resume_step: int | None = None
    ) -> None:
        """Open a file of events; of earlier ones, steps after `resume_step` are not shown."""
        first = 0 if resume_step is None else resume_step + 1
        self.writer = event_writer(Path(folder) / TENSORBOARD, first)
        self.writer.add_text(SETTINGS, indented(config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one step; what a killed process wrote up to here is on disk."""
        for key, value in values.items():
            self.writer.add_scalar(key, float(value), step)
        self.writer.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary as text and close the file."""
        self.writer.add_text("summary", indented(summary))
        self.writer.close()


@dataclass(frozen=True, slots=True)
class Tracker:
    """Sends the same numbers to every sink; `tracker(step, values)` is the loop's `track`."""

    sinks: Sequence[RunRecord | WandbSink | TensorBoardSink]

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of one step."""
        for sink in self.sinks:
            sink.log(step, values)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Send the numbers of the whole run and close the sinks."""
        for sink in self.sinks:
            sink.finish(summary)


def open_tracker(
    folder: Path,
    config: Mapping[str, Any],
    *,
    resume_step: int | None = None,
    wandb: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
) -> Tracker:
    """Write config.json and environment.json, and return the run's `track`.

    `resume_step` is the last step that the restored state holds, None starts over; `wandb` has
    keyword arguments of `WandbSink` (project, name, group, tags), None leaves it out;
    `tensorboard` adds event files.
    """
    record = RunRecord(folder, resume_step=resume_step)
    record.write_config(config)
    settings = config.get(SETTINGS, config)
    add_session(
        record.folder,
        describe_environment(settings.get("device", "auto")),
        is_resumed=resume_step is not None,
    )
    sinks: list[RunRecord | WandbSink | TensorBoardSink] = [record]
    if tensorboard:
        sinks.append(TensorBoardSink(folder, settings, resume_step=resume_step))
    if wandb is not None:
        sinks.append(WandbSink(folder, settings, resume=resume_step is not None, **wandb))
    return Tracker(sinks)


def send_comparison(
    folder: Path, project: str, *, header: Sequence[str], rows: Sequence[Sequence[Any]], page: Path
) -> None:
    """Send a table of runs and its HTML page to a W&B project, as one run; files in `folder`."""
    run = start_wandb(project=project, dir=str(folder), name=COMPARE, job_type=COMPARE)
    wandb = import_wandb("--wandb-project")
    table = wandb.Table(columns=list(header), data=[list(row) for row in rows])
    run.log({"compare/numbers": table, "compare/page": wandb.Html(str(page))})
    run.finish()


def read_project(project: str, group: str | None = None) -> list[dict[str, Any]]:
    """Return the runs of a W&B project, oldest first: what `WandbSink` has sent of each.

    That is its name, config, rows (with `step`, as metrics.jsonl has them) and summary. The
    project's name may have the entity before a slash.
    """
    wandb = import_wandb("--wandb-project")
    try:
        found = wandb.Api().runs(
            project, filters={"group": group} if group else {}, order="+created_at"
        )
        runs = [read_wandb_run(run) for run in found if run.job_type != COMPARE]
    except (wandb.errors.UsageError, wandb.errors.CommError, ValueError) as error:
        remedy = "check the project's name, and run `wandb login`"
        raise ValueError(
            f"--wandb-project {project}: {str(error).rstrip('.')}; {remedy}"
        ) from error
    if not runs:
        raise ValueError(f"--wandb-project {project} has no such runs; check project and group")
    return runs


def read_wandb_run(run: "wandb.apis.public.Run") -> dict[str, Any]:
    """Return one run of W&B's API as plain values; W&B's own keys are left out."""
    rows = []
    for row in run.scan_history():
        values = {key: value for key, value in row.items() if is_ours(key, value)}
        rows.append({"step": int(row.get(STEP_KEY, row["_step"])), **values})
    summary = {key: value for key, value in dict(run.summary).items() if is_ours(key, value)}
    return {"name": run.name, "config": dict(run.config), "rows": rows, "summary": summary}


def is_ours(key: str, value: object) -> bool:
    """Whether a key of W&B is one that was sent, with a number that counts."""
    is_own = key.startswith("_") or key == STEP_KEY
    return not is_own and isinstance(value, int | float) and math.isfinite(value)


def start_wandb(**settings: object) -> Any:
    """Return a started W&B run, or say in one line why there is none."""
    wandb = import_wandb("--wandb")
    try:
        return wandb.init(settings=wandb.Settings(console="off"), **settings)
    except (wandb.errors.UsageError, wandb.errors.CommError) as error:
        remedy = "run `wandb login`, or set WANDB_MODE=offline and `wandb sync` later"
        raise ValueError(f"--wandb: {str(error).rstrip('.')}; {remedy}") from error


def import_wandb(flag: str) -> ModuleType:
    """Return wandb, or say which flag needs it."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"{flag} needs wandb, which is absent: pip install wandb") from error
    return wandb


def event_writer(folder: Path, first_step: int) -> "SummaryWriter":
    """Return what writes TensorBoard's event files, or say what is absent."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "--tracking.to tensorboard needs tensorboard, which is absent: pip install tensorboard"
        ) from error
    return SummaryWriter(str(folder), purge_step=first_step)


def indented(values: Mapping[str, Any]) -> str:
    """Return values as the text that TensorBoard shows as it stands."""
    return textwrap.indent(json.dumps(values, indent=1, default=str), "\t")


def run_id(path: Path, *, resume: bool) -> str:
    """Return the id kept in a file, or make one and keep it there."""
    if resume and path.is_file():
        return read_as(path, WandbId, remedy="remove it to go on as another run").id
    made = secrets.token_hex(4)
    write_json(path, {"id": made})
    return made
