"""Tasks of lm-evaluation-harness, such as ARC and HellaSwag, on a model in memory."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedTokenizerBase

from qat.data.text import bos_id
from qat.storage.decode import reading

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.result_schema import EvalResults
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

ABSENT = "--tasks needs lm-eval, which is absent: pip install 'lm-eval>=0.4.13'"
EXAMPLES_SEED = 1234  # of lm-eval's own command, so that the examples in prompts are the same
TaskNumbers = dict[str, float | int | None]


def load_tasks(names: Sequence[str]) -> "TaskDict":
    """Return tasks by lm-eval's names, patterns such as mmlu_*, or YAML files, with their data.

    Raises:
        ValueError: If lm-eval is absent, a name is none of its tasks, or a file is none of a task.
        FileNotFoundError: If the data of a task is not within reach.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(ABSENT) from error

    with quiet_library():
        # To look through its own tasks takes seconds, which files do not need.
        manager = TaskManager(include_defaults=not all(Path(name).is_file() for name in names))
        found = [one for name in names for one in matching_tasks(manager, name)]
        with reading(f"--tasks {' '.join(names)}", "correct the task's file, or name another task"):
            try:
                return manager.load(found)
            except OSError as error:
                why = " ".join(str(error).split()).rstrip(".")
                raise FileNotFoundError(
                    f"--tasks {' '.join(names)}: data is not within reach ({why}); let this "
                    "machine reach the hub once, or give the YAML file of a task on local data"
                ) from error


def matching_tasks(manager: "TaskManager", name: str) -> list[str]:
    """Return the tasks of a name, which may be a pattern; a file stands for itself."""
    if Path(name).is_file():
        return [name]
    found = manager.match_tasks([name])
    if not found:
        raise ValueError(
            f"--tasks {name} is no task of lm-eval and no file; `lm-eval ls tasks` lists them"
        )
    return found


def measure_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: "TaskDict",
    *,
    num_fewshot: int | None,
    num_examples: int | None,
    batch_size: int,
) -> dict[str, TaskNumbers]:
    """Return the metrics of each task and group by name, with what they depend on.

    Args:
        model: A causal LM on its device, in eval mode.
        tokenizer: Of the model; prompts begin with BOS where it puts one.
        tasks: As `load_tasks` gives them.
        num_fewshot: Solved examples in each prompt; None = as the task says. A task that says 0
            keeps it.
        num_examples: Questions of each task at most; None = all.
        batch_size: Prompts of a forward pass.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in tasks["tasks"].values():
        choose_examples(task, num_fewshot)
    with quiet_library(), keeping_ties(model):
        wrapped = HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            add_bos_token=bos_id(tokenizer) is not None,
        )
        found = evaluate(wrapped, tasks, limit=num_examples, log_samples=False)
    return {name: numbers_of(found, name) for name in found["results"]}


def choose_examples(task: "Task", num_fewshot: int | None) -> None:
    """Set how many solved examples a task's prompts hold, as lm-eval's own command does."""
    own = task.get_config("num_fewshot")
    if own != 0 and (num_fewshot is not None or own is None):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=EXAMPLES_SEED)


def numbers_of(found: "EvalResults", name: str) -> TaskNumbers:
    """Return a task's metrics, its standard errors None where there are none."""
    values: TaskNumbers = {}
    for key, value in found["results"][name].items():
        metric, has_filter, answers = key.partition(",")
        if has_filter:
            values[metric if answers == "none" else key] = as_number(metric, value)
    counts: Mapping[str, int] = found["n-samples"].get(name, {})
    return {
        **values,
        "num_fewshot": found["n-shot"].get(name),
        "examples": counts.get("effective"),
        "version": found["versions"].get(name),
    }


def as_number(metric: str, value: object) -> float | int | None:
    """Return a metric's value; None for the error of one example, and where there is no number."""
    is_number = isinstance(value, int | float)
    has_no_error = metric.endswith("_stderr") and is_number and not math.isfinite(value)
    return value if is_number and not has_no_error else None


@contextmanager
def keeping_ties(model: nn.Module) -> Iterator[None]:
    """Keep lm-eval from tying weights anew: a student's head shares a layer, not a parameter."""
    model.tie_weights = lambda: None
    try:
        yield
    finally:
        del model.tie_weights


@contextmanager
def quiet_library() -> Iterator[None]:
    """Leave out what lm-eval logs of a model that it did not load itself."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
