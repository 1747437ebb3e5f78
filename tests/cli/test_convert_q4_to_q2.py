import shutil

import pytest
import torch
from safetensors.torch import load_file

from qat.model.checkpoint import read_checkpoint, read_header
from qat.model.surgery import layers_of_kind
from qat.quant.plan import kind_specs
from qat.quant.spec import TensorSpec, make_spec
from tests.tiny import save_tiny, tiny_llama

pytestmark = pytest.mark.recipe

SIZES = {"bits_per_weight", "bits_per_weight_mlp", "bits_per_weight_model"}


def test_the_closing_line_tells_of_the_student(path):
    """All keys of the specification; fewer bits cost distance."""
    closing, previous = path.closing["q2"], path.closing["q4"]
    assert (
        closing.keys()
        >= {"checkpoint", "seconds", "peak_rss_bytes", "kl_nats_lower", "kd_loss"} | SIZES
    )
    assert closing["bits_per_weight_mlp"] == pytest.approx(2.5, abs=0.02)
    assert all(closing[name] < previous[name] for name in SIZES)
    assert closing["kl_nats_lower"] > previous["kl_nats_lower"]


def test_attention_is_kept_to_the_bit(path):
    """Only MLP layers are fitted anew: every other tensor is the same, dense parts included."""
    before = load_file(path.q4 / "student.safetensors")
    after = load_file(path.q2 / "student.safetensors")
    kept = [name for name in before if ".mlp." not in name]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    layers = layers_of_kind(read_checkpoint(path.q2)[0], "mlp")
    assert {layer.spec.bits for layer in layers.values()} == {2}


def test_the_student_knows_where_it_comes_from(path):
    """The same base model, a plan that says both sizes, command and settings."""
    header = read_header(path.q2)
    assert header.base_model == read_header(path.q4).base_model
    specs, before = kind_specs(header.plan), kind_specs(read_header(path.q4).plan)
    assert specs == {"mlp": make_spec(2), "attention": before["attention"]}
    assert header.made_by["command"] == "convert-q4-to-q2"


def test_what_is_made_already_is_found(run, path):
    """The same recipe takes no time and gives the same numbers."""
    flags = {"q4_checkpoint": path.q4, "output": path.q2, "cache_dir": path.cache, "eval": True}
    again = run("convert-q4-to-q2", **flags)
    assert again.closing == path.closing["q2"]
    assert "nothing to do" in again.said


def test_a_conversion_is_the_same_every_time(run, path, tmp_path):
    """Two processes, two seeds, one file."""
    sums = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        flags = {"q4_checkpoint": path.q4, "cache_dir": path.cache}
        done = run("convert-q4-to-q2", output=tmp_path / str(seed), **flags)
        assert done.code == 0
        sums.append(read_header(tmp_path / str(seed)).sha256)
    assert sums[0] == sums[1] == read_header(path.q2).sha256


@pytest.mark.parametrize(
    ("flags", "name", "fit"),
    [
        ({"q2_mlp_rank": 4}, "lut2-r4", "hessian"),
        ({"q2_mlp_rank": 4}, "lut2-r4", "moments"),
        ({"q2_mlp_group_size": 16}, "lut2-g16", "moments"),
        ({"q2_mlp_codebook": "int"}, "int2-g64", "hessian"),
        ({"q2_mlp_lut_size": 8}, "lut3-g32", "hessian"),
    ],
)
def test_the_mlp_gets_the_form_that_is_asked_for(run, path, tmp_path, fit, flags, name):
    """Low rank, other groups, a runtime's grid, three bits."""
    flags |= {"q4_checkpoint": path.q4, "cache_dir": path.cache, "output": tmp_path / "s"}
    done = run("convert-q4-to-q2", fit=fit, **flags)
    assert done.code == 0, done.said
    specs = kind_specs(read_header(tmp_path / "s").plan)
    assert specs == {"mlp": TensorSpec.from_name(name), "attention": make_spec(4)}
    read_checkpoint(tmp_path / "s")


def test_a_run_stands_for_its_best_student(run, path, tmp_path):
    """The folder of a run is as good as the student in it."""
    shutil.copytree(path.q4, tmp_path / "run" / "best")
    flags = {"q4_checkpoint": tmp_path / "run", "cache_dir": path.cache, "eval": True}
    done = run("convert-q4-to-q2", output=tmp_path / "s", **flags)
    assert done.closing["kl_nats_lower"] == path.closing["q2"]["kl_nats_lower"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"q4_checkpoint": "no/such/student"}, "no folder no/such/student"),
        ({"q2_mlp_lut_size": 5}, "--q2-mlp-lut-size 5 is not one of 4, 8"),
        ({"q2_mlp_group_size": 48}, "group size 48 does not divide a row of 64"),
        ({"q2_mlp_rank": 500}, "rank 500 exceeds"),
        ({"cache_dir": "no/such/cache"}, "cache no/such/cache does not exist"),
        ({"eval": True}, "--eval needs a cache to measure on; add --cache-dir"),
        ({"model_id": "no/such/model"}, "no folder no/such/model"),
    ],
)
def test_bad_input_is_one_line(refused, path, tmp_path, flags, message):
    """What, and what to do; nothing is written."""
    flags = {"q4_checkpoint": path.q4, "output": tmp_path / "s", **flags}
    assert message in refused("convert-q4-to-q2", **flags)
    assert list(tmp_path.iterdir()) == []


def test_a_full_precision_model_is_no_4_bit_student(refused, path, tmp_path):
    """With the command that makes one."""
    flags = {"q4_checkpoint": path.teacher, "output": tmp_path / "s"}
    assert "is a full-precision model; `qat init-student`" in refused("convert-q4-to-q2", **flags)


@pytest.mark.parametrize(
    ("changes", "found"),
    [({"hidden_size": 32}, "(128, 32)"), ({"num_hidden_layers": 1}, "no match")],
)
def test_another_models_weights_are_refused(refused, path, tmp_path, changes, found):
    """A base model of other sizes wrote a student that no model could load."""
    save_tiny(tmp_path / "m", tiny_llama(**changes))
    flags = {"q4_checkpoint": path.q4, "output": tmp_path / "s", "model_id": tmp_path / "m"}
    message = refused("convert-q4-to-q2", **flags)
    assert found in message
    assert "give the model it was made from with --model-id" in message
    assert not (tmp_path / "s").exists()


def test_a_base_model_that_changed_is_refused(refused, run, path, tmp_path):
    """The path that the student names holds other weights by now."""
    shutil.copytree(path.teacher, tmp_path / "m")
    flags = {"model": tmp_path / "m", "output": tmp_path / "q4", "fit": "moments"}
    assert run("init-student", **flags).code == 0
    save_tiny(tmp_path / "m", tiny_llama(seed=3))
    flags = {"q4_checkpoint": tmp_path / "q4", "output": tmp_path / "s"}
    assert "holds other weights than" in refused("convert-q4-to-q2", **flags)


def test_the_input_is_never_the_output(refused, path, tmp_path):
    """A student was replaced by what was made of it, also through the run that holds it."""
    shutil.copytree(path.q4, tmp_path / "run" / "best")
    before = read_header(tmp_path / "run" / "best").sha256
    for source in (tmp_path / "run", tmp_path / "run" / "best"):
        flags = {"q4_checkpoint": source, "output": tmp_path / "run" / "best"}
        assert "name another" in refused("convert-q4-to-q2", **flags)
    assert read_header(tmp_path / "run" / "best").sha256 == before
