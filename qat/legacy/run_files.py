"""What a run leaves in the seeds' form next to its native students, under the seeds' names.

best_state_dict.pt               the best student
v2_{preset}_fp32_{time}.pt       the last one
v2_{preset}_fp16_{time}.pt       the last one, every number on the float16 grid
config.json                      the run's own, with what their programs read from it
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qat.legacy.student import config_of_student, write_seed_state
from qat.model.checkpoint import is_checkpoint, read_checkpoint, read_header
from qat.quant.plan import kind_specs
from qat.storage.files import write_json
from qat.tracking.record import CONFIG, read_config

BEST_FILE = "best_state_dict.pt"
LAST_FILES = "v2_{preset}_{dtype}_{time}.pt"
TIME_FORMAT = "%Y%m%d_%H%M%S"


def why_no_seed_files(plan: dict[str, Any], *, came_in_theirs: bool) -> str | None:
    """Return why a student is not written in the seeds' form as well; None where it is."""
    specs = kind_specs(plan)
    kinds = [specs.get("mlp"), specs.get("attention")]
    if specs.keys() != {"mlp", "attention"} or None in kinds:
        return "the seeds' form holds one format for MLP and one for attention, nothing else"
    if any(kind.floor is not None for kind in kinds):
        return "its scales are floored, as V1's; `qat convert-v1-to-v2` makes a student without"
    if came_in_theirs or all(kind.rank for kind in kinds):
        return None
    return "the seeds' form holds low-rank scales, this student has groups"


def write_seed_files(
    folder: Path,
    *,
    best: str,
    last: str,
    model_id: str,
    time: str,
    weight_of: Callable[[str], Tensor | None],
    snap: Callable[[nn.Module], Any],
) -> list[str]:
    """Write a run's students in the seeds' form; return the names of the files.

    Files of an earlier end of this run, cut short, are replaced. A student that float16 does not
    hold has no file of it.
    """
    plan = read_header(folder / last).plan
    # A run whose held-out sequences count nothing has no best student.
    student, _header = read_checkpoint(folder / (best if is_checkpoint(folder / best) else last))
    write_seed_state(student, folder / BEST_FILE, weight_of=weight_of)
    student, _header = read_checkpoint(folder / last)
    config = config_of_student(student, model_id)
    preset = config.get("config_preset", plan["name"])
    write_json(folder / CONFIG, read_config(folder) | config)
    names = {
        dtype: LAST_FILES.format(preset=preset, dtype=dtype, time=time)
        for dtype in ("fp32", "fp16")
    }
    for dtype in names:
        for previous in folder.glob(LAST_FILES.format(preset=preset, dtype=dtype, time="*")):
            previous.unlink()
    write_seed_state(student, folder / names["fp32"], weight_of=weight_of)
    try:
        snap(student)
    except ValueError:
        return [BEST_FILE, names["fp32"]]
    write_seed_state(student, folder / names["fp16"], weight_of=weight_of, is_float16=True)
    return [BEST_FILE, *names.values()]
