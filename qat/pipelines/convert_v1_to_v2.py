"""A student of the seeds' first form to the second."""

from torch import nn

from qat.legacy.v1_to_v2 import remove_floors
from qat.pipelines.quantize_config import ConvertV1ToV2Config
from qat.pipelines.students import Numbers, StudentResult, change_student
from qat.quant.plan import QuantPlan
from qat.quant.spec import TensorSpec


def convert_v1_to_v2(config: ConvertV1ToV2Config) -> StudentResult:
    """Open the student, remove the floor under its scales, measure before and after, write."""
    return change_student("convert-v1-to-v2", config, config.v1_checkpoint, unfloored)


def unfloored(student: nn.Module, plan: QuantPlan) -> tuple[QuantPlan, Numbers]:
    """Remove the floors; return the plan without them and what that cost."""
    report = remove_floors(student).values()
    return plan.changed(TensorSpec.without_floor), report
