import pytest
import torch

from qat.calibrate.statistics import collect_second_moments
from qat.distill.kl import forward_kl
from qat.distill.teacher import dense_signal
from qat.model.layers import FakeQuantLinear
from qat.model.surgery import dense_weights, quantized_layers
from qat.pipelines.fit_layers import FitTask, fit_by_decoder_layers, fit_with_moments
from tests.tiny import plan_of, quantize_plainly, tiny_llama


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(261, (4, 12), generator=generator) for _ in range(4)]


def task_of(model, plan="q2a4"):
    """Return what `quantize_model` fits, checked as it checks."""
    found = plan_of(model, plan)
    modules = dense_weights(model, found)
    task = FitTask(
        specs=found.quantized, weight_of=lambda name: modules[name].weight, row_weights={}
    )
    task.check()
    return task


def moments_of(model):
    return collect_second_moments(model, dense_weights(model, plan_of(model)), batches())


@pytest.mark.recipe
def test_calibration_makes_better_students():
    """In KL from a model with loud channels, on the text that calibrated."""
    teacher = tiny_llama()
    spread = torch.ones(64)
    spread[::8] = 16.0
    for layer in teacher.model.layers:  # loud channels, as trained models have
        layer.input_layernorm.weight.data *= spread
        layer.self_attn.q_proj.weight.data /= spread
        layer.self_attn.k_proj.weight.data /= spread
        layer.self_attn.v_proj.weight.data /= spread
    ids = torch.cat(batches())
    signal = dense_signal(teacher(ids).logits, torch.ones(ids.shape, dtype=torch.bool))
    importance = moments_of(teacher)

    def distance(moments):
        student = tiny_llama()
        student.load_state_dict(teacher.state_dict())
        fit_with_moments(student, task_of(student), moments)
        return forward_kl(student(ids).logits, signal).mean().item()

    plain = distance(None)
    weighted = distance(importance)
    assert weighted < 0.9 * plain


def test_a_student_is_the_same_every_time():
    """No luck in it: two fits give the same bits, whatever the seed."""
    students = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        student = quantize_plainly(tiny_llama(), "q3_r2")
        students.append(quantized_layers(student))
    for name, layer in students[0].items():
        other = students[1][name]
        assert torch.equal(layer.fake_quantized_weight(), other.fake_quantized_weight())


def by_decoder_layers(model):
    fit_by_decoder_layers(model, task_of(model), batches(), dtype=torch.float32)


def test_a_plan_that_does_not_fit_changes_nothing():
    """The model is as it was: the check comes first."""
    model = tiny_llama()
    with pytest.raises(ValueError, match="does not fit"):
        quantize_plainly(model, "q4_g48")
    assert not any(isinstance(module, FakeQuantLinear) for module in model.modules())
