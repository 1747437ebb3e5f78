"""Whether processes that train a student together hold a copy of it each, or some rows."""

import torch

from qat.cache.read import TeacherCache
from qat.model.checkpoint import empty_model
from qat.model.surgery import model_tensors
from qat.pipelines.open_checkpoint import Checkpoint
from qat.pipelines.place import Place
from qat.pipelines.planned_memory import GIB, ModelSizes, Situation, predict_memory
from qat.quant.plan import plan_from_dict
from qat.runtime.device import is_traced
from qat.runtime.launch import num_local_processes, num_processes
from qat.tracking.messages import say
from qat.train.config import TrainConfig
from qat.train.run_folder import splittable


def needs_split(
    config: TrainConfig, student: Checkpoint, cache: TeacherCache, place: Place
) -> bool:
    """Whether copies of a student would not fit the processes' devices by prediction; says so.

    Rows are never chosen where they cannot be had, or would be as large as a copy.
    """
    count, total = num_processes(), place.device.total_bytes()
    if count == 1 or config.shard or total is None:
        return config.shard
    if place.dtype == torch.float16 or config.optim.averages or config.form_weights == "in-use":
        return False
    if is_traced(place.device.torch_device):
        return False  # the chips of a host hold rows already
    model = empty_model(student.text_folder, device="meta")
    plan = plan_from_dict(student.header.plan, model_tensors(model))
    if not splittable(plan.quantized.values()):
        return False
    own = total // num_local_processes() if place.device.shares_host_memory else total
    longest = max((length for _, length in config.lengths()), default=cache.seq_len)
    parts = config.parts(is_low_rank=any(spec.rank for spec in plan.quantized.values()))
    sizes = ModelSizes.of(model, plan, kinds=config.kinds, moves_weights="weights" in parts)
    copies, rows = (
        predict_memory(
            sizes,
            Situation.on(
                place,
                batch_size=config.batch_size,
                seq_len=longest,
                num_processes=count,
                is_split=is_split,
                recomputes=config.gradient_checkpointing,
                keeps_states=place.device.shares_host_memory and config.intervals.save_steps > 0,
            ),
        )["train"]
        for is_split in (False, True)
    )
    chosen = own < copies and rows < copies
    if chosen:
        say(
            f"--shard chosen: by prediction a process with a copy of the student holds "
            f"{copies / GIB:.2f} GiB, with rows of it {rows / GIB:.2f}, and has {own / GIB:.2f}"
        )
    return chosen
