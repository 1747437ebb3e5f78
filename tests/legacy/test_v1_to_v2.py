"""The first form's floor goes; no weight above it changes, and what is lost is told."""

import json

import pytest
import torch

from qat.cli.commands import main
from qat.legacy.v1_to_v2 import remove_floors
from qat.model.surgery import quantized_layers
from qat.pipelines.open_checkpoint import load_model
from tests.seeds import make_v1, make_v2


@pytest.fixture
def made(tmp_path):
    """A first-form checkpoint with negative products, as training leaves them."""
    seeds = make_v1(tmp_path)
    seeds.file = seeds.write(tmp_path / "run", "model_state_dict.pt")
    return seeds


def product_of(made, name):
    state = made.state
    width = state[f"{name}.weight"].shape[1]
    return (state[f"{name}.scale_A"] @ state[f"{name}.scale_B"])[:, :width]


def run(made, output, *flags):
    return main(
        "convert-v1-to-v2", ["--v1-checkpoint", str(made.file), "--output", str(output), *flags]
    )


@pytest.mark.recipe
@pytest.mark.parametrize("name", ["v2.pt", "native"])
def test_weights_above_the_floor_stay(tmp_path, made, capsys, name):
    """To 1e-6 wherever the product is positive, in either form of output."""
    assert run(made, tmp_path / "out" / name) == 0
    closing = json.loads(capsys.readouterr().out)
    student, _ = load_model(tmp_path / "out" / name, model_id=str(made.base))
    count = 0
    for layer_name, layer in quantized_layers(student).items():
        product = product_of(made, layer_name)
        error = (layer.fake_quantized_weight() - made.expected[layer_name]).abs()
        assert error[product > 0].max() <= 1e-6
        count += int((product < 1e-8).sum())
    assert closing["floored_weights"] == count
    assert count > 0
    assert closing["largest_weight_error"] > 0
    assert 0 < closing["relative_square_error"] < 0.1


def test_weights_below_the_floor_are_the_nearest_there_are(made):
    """Their scale is what it is; of all codebook values the one nearest to the first form's."""
    student, _ = load_model(made.file)
    report = remove_floors(student)
    for name, layer in quantized_layers(student).items():
        product = product_of(made, name)
        below = product < 1e-8
        expected, found = made.expected[name], layer.fake_quantized_weight()
        choices = [(product * value - expected).abs() for value in layer.codebook.tolist()]
        best = torch.stack(choices).min(0).values
        assert torch.allclose((found - expected).abs()[below], best[below], atol=1e-6)
    assert report.num_floored > 0


def test_the_written_form_is_the_second(tmp_path, made, capsys):
    """Unit directions, a magnitude a rank, and the latent weights of the first form."""
    assert run(made, tmp_path / "v2.pt") == 0
    state = torch.load(tmp_path / "v2.pt", weights_only=True)
    for name in made.expected:
        rank = len(state[f"{name}.rank_magnitude"])
        assert torch.allclose(state[f"{name}.scale_A"].norm(dim=0), torch.ones(rank), atol=1e-5)
        assert torch.allclose(state[f"{name}.scale_B"].norm(dim=1), torch.ones(rank), atol=1e-5)
        assert torch.equal(state[f"{name}.weight"], made.state[f"{name}.weight"])
    capsys.readouterr()


@pytest.mark.recipe
def test_run_again_it_finds_its_work(tmp_path, made, capsys):
    """The same command on the same file does nothing and says the same."""
    assert run(made, tmp_path / "v2.pt") == 0
    first = json.loads(capsys.readouterr().out)
    assert run(made, tmp_path / "v2.pt") == 0
    again = capsys.readouterr()
    assert json.loads(again.out) == first
    assert "nothing to do" in again.err


def test_only_the_first_form_is_taken(tmp_path, capsys):
    """A second-form file, a model and a missing file each end in one line."""
    made = make_v2(tmp_path)
    made.file = made.write(tmp_path / "run")
    assert run(made, tmp_path / "out") == 2
    assert "no student of the seeds' first form" in capsys.readouterr().err
    made.file = made.base
    assert run(made, tmp_path / "out") == 2
    assert "full-precision model" in capsys.readouterr().err
    made.file = tmp_path / "nothing.pt"
    assert run(made, tmp_path / "out") == 2
    assert "nothing.pt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_output_must_not_be_the_input(tmp_path, made, capsys):
    """Nothing is written over what is read."""
    assert run(made, made.file) == 2
    assert "name another" in capsys.readouterr().err
