"""After snapping every stored number is a float16 one, and the student is what its file says."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qat.cli.commands import main
from qat.legacy.fp16_snap import snap_student
from qat.model.checkpoint import CheckpointHeader, bits_per_weight, write_checkpoint
from qat.model.surgery import quantized_layers
from qat.pipelines.open_checkpoint import load_model
from tests.seeds import make_v1, make_v2
from tests.tiny import plan_of, save_tiny, tiny_llama, tiny_student


def on_grid(tensor):
    return torch.equal(tensor.half().float(), tensor.float())


def weights_of(student):
    return {name: m.fake_quantized_weight() for name, m in quantized_layers(student).items()}


def close(first, second, tolerance):
    return all(
        (first[name] - second[name]).abs().max() <= tolerance * first[name].abs().max()
        for name in first
    )


@pytest.fixture
def made(tmp_path):
    """A second-form checkpoint in float32."""
    seeds = make_v2(tmp_path)
    seeds.file = seeds.write(tmp_path / "run")
    return seeds


def run(source, output, *flags):
    return main("snap-fp16", ["--checkpoint", str(source), "--output", str(output), *flags])


@pytest.mark.recipe
@pytest.mark.parametrize("maker", [make_v1, make_v2])
def test_a_native_folder_holds_float16_numbers_only(tmp_path, maker, capsys):
    """Every tensor of the file, at half the bits for scales; weights move by float16 rounding."""
    made = maker(tmp_path)
    file = made.write(tmp_path / "run")
    assert run(file, tmp_path / "snapped") == 0
    closing = json.loads(capsys.readouterr().out)
    stored = load_file(tmp_path / "snapped" / "student.safetensors")
    assert all(on_grid(tensor) for tensor in stored.values() if tensor.is_floating_point())
    before, _ = load_model(file)
    after, _ = load_model(tmp_path / "snapped")
    assert close(weights_of(before), weights_of(after), 4e-3)
    assert closing["bits_per_weight"] == bits_per_weight(after)["bits_per_weight"]
    assert closing["bits_per_weight"] < bits_per_weight(before)["bits_per_weight"]
    assert closing["numbers_changed"] > 0


@pytest.mark.recipe
def test_their_form_holds_float16_numbers_only(tmp_path, made, capsys):
    """Latent weights too; scales are baked, so nothing is normalized away from the grid."""
    assert run(made.file, tmp_path / "out" / "snapped.pt") == 0
    state = torch.load(tmp_path / "out" / "snapped.pt", weights_only=True)
    assert all(on_grid(tensor) for tensor in state.values() if tensor.is_floating_point())
    flags = [tensor for key, tensor in state.items() if key.endswith("_scales_baked_flag")]
    assert flags
    assert all(int(flag) == 1 for flag in flags)
    after, _ = load_model(tmp_path / "out" / "snapped.pt", model_id=str(made.base))
    for name, weight in weights_of(after).items():
        parts = {part: state[f"{name}.{part}"] for part in ("_Q", "scale_A", "scale_B")}
        assert torch.allclose(weight, parts["_Q"] * (parts["scale_A"] @ parts["scale_B"]))
        assert (state[f"{name}.rank_magnitude"] == 1).all()
    capsys.readouterr()


@pytest.mark.recipe
@pytest.mark.parametrize("plan", ["q2a4", "q2a4_r4"])
def test_what_lies_on_the_grid_stays(tmp_path, plan, capsys):
    """Our own students are float16 from the start: not a bit changes, in a native folder."""
    base = save_tiny(tmp_path / "base", tiny_llama())
    student = tiny_student("llama", plan)
    for tensor in student.parameters():
        tensor.data = tensor.data.half().float()
    header = CheckpointHeader(
        plan=plan_of(student, plan).to_dict(), base_model={"path": str(base), "weights": None}
    )
    write_checkpoint(student, header, tmp_path / "native", text_source=base)
    assert run(tmp_path / "native", tmp_path / "out") == 0
    closing = json.loads(capsys.readouterr().out)
    assert closing["numbers_changed"] == 0
    after, _ = load_model(tmp_path / "out")
    for name, weight in weights_of(after).items():
        assert torch.equal(weight, weights_of(student)[name])
    assert run(tmp_path / "native", tmp_path / "out.pt") == 0
    assert run(tmp_path / "out.pt", tmp_path / "again") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["numbers_changed"] == 0


def test_twice_is_once(made):
    """Snapping is idempotent."""
    student, _ = load_model(made.file)
    snap_student(student)
    once = weights_of(student)
    report = snap_student(student, bake=True)
    assert report.numbers_changed == 0
    assert all(torch.equal(once[name], weight) for name, weight in weights_of(student).items())


@pytest.mark.recipe
def test_overflow_is_refused(tmp_path, made, capsys):
    """A number beyond float16 is named, and nothing is written."""
    name = next(iter(made.expected))
    made.state[f"{name}.rank_magnitude"][0] = 1e7
    assert run(made.write(tmp_path / "large"), tmp_path / "out") == 2
    assert f"{name}.scale_a" in capsys.readouterr().err
    student, _ = load_model(made.file)
    student.model.norm.weight.data[0] = 7e4
    previous = weights_of(student)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN or values beyond 65504"):
        snap_student(student)
    assert all(torch.equal(previous[name], weight) for name, weight in weights_of(student).items())
    assert not (tmp_path / "out").exists()


def test_the_count_is_of_numbers_that_changed():
    """A scale between two float16 numbers counts, one below the least of them is lost."""
    student = tiny_student()
    for tensor in student.parameters():
        tensor.data = tensor.data.half().float()
    student.model.norm.weight.data[:3] = torch.tensor([1 + 2**-13, 1e-9, 1.0])
    report = snap_student(student)
    assert (report.numbers_changed, report.numbers_lost) == (2, 1)
    assert report.largest_change == 2**-13
