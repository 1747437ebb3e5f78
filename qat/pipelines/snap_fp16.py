"""A student whose every stored number is a float16 one."""

from torch import nn

from qat.legacy.fp16_snap import snap_student
from qat.pipelines.quantize_config import SEED_SUFFIX, SnapFp16Config
from qat.pipelines.students import Numbers, StudentResult, change_student
from qat.quant.plan import QuantPlan


def snap_fp16(config: SnapFp16Config) -> StudentResult:
    """Open the student, round it, measure before and after, write."""

    def change(student: nn.Module, plan: QuantPlan) -> tuple[QuantPlan, Numbers]:
        report = snap_student(student, bake=config.output.suffix == SEED_SUFFIX)
        return plan.changed(lambda spec: spec.stored_as("float16")), report.values()

    return change_student("snap-fp16", config, config.checkpoint, change, is_float16=True)
