import shutil

import pytest
import torch

from qat.model.checkpoint import bits_per_weight, read_checkpoint, read_header
from qat.model.load import load_dense
from tests.tiny import TINY_MODELS, save_tiny, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.recipe

KEYS = {
    "checkpoint",
    "seconds",
    "peak_rss_bytes",
    "bits_per_weight",
    "bits_per_weight_mlp",
    "bits_per_weight_model",
}
MEASURED = {
    "kl_nats_lower",
    "kd_loss",
    "perplexity",
    "perplexity_stderr",
    "top1_agreement",
    "tokens",
}


def test_the_closing_line_tells_of_the_student(path):
    """Every key of the specification; sizes are those of the student on disk."""
    closing = path.closing["q4"]
    assert closing.keys() >= KEYS | MEASURED
    student, header = read_checkpoint(path.q4)
    assert closing["checkpoint"] == str(path.q4)
    assert {name: closing[name] for name in bits_per_weight(student)} == bits_per_weight(student)
    assert header.metrics["kl_nats_lower"] == closing["kl_nats_lower"]
    assert 0 < closing["kl_nats_lower"] < 1


def test_the_student_knows_where_it_comes_from(path):
    """Base model by path and hash, cache by fingerprint, command and settings."""
    header = read_header(path.q4)
    assert header.base_model["path"] == str(path.teacher)
    assert header.base_model["name"] == "teacher"
    assert path.cache.name.endswith(header.cache_fingerprint)
    assert header.made_by["command"] == "init-student"
    assert header.made_by["settings"]["plan"] == "q4a4"


def test_what_is_made_already_is_found(run, path):
    """The same recipe at the same place takes no time and gives the same numbers."""
    before = (path.q4 / "student.safetensors").stat().st_mtime_ns
    flags = {"model": path.teacher, "plan": "q4a4", "cache_dir": path.cache, "output": path.q4}
    again = run("init-student", **flags)
    assert again.closing == path.closing["q4"]
    assert "already complete: nothing to do" in again.said
    assert (path.q4 / "student.safetensors").stat().st_mtime_ns == before


def test_contents_decide_not_places(run, path, tmp_path):
    """A teacher that moved gives the same student: found, not made again."""
    shutil.copytree(path.q4, tmp_path / "q4")
    shutil.copytree(path.teacher, tmp_path / "moved")
    done = run(
        "init-student",
        model=tmp_path / "moved",
        plan="q4a4",
        cache_dir=path.cache,
        output=tmp_path / "q4",
    )
    assert "nothing to do" in done.said


@pytest.mark.parametrize("change", [{"plan": "q4a4_g16"}, {"eval": False}])
def test_a_student_of_another_recipe_is_not_replaced(refused, path, tmp_path, change):
    """Both values are named."""
    shutil.copytree(path.q4, tmp_path / "q4")
    flags = {"model": path.teacher, "plan": "q4a4", "cache_dir": path.cache, **change}
    said = refused("init-student", output=tmp_path / "q4", **flags)
    (name,) = change
    assert f"({name} " in said
    assert f"{change[name]} here); choose another --output" in said
    assert read_header(tmp_path / "q4") == read_header(path.q4)


@pytest.mark.parametrize(
    ("family", "tied", "fit"),
    [
        *((family, True, "hessian") for family in TINY_MODELS),
        *((family, False, "moments") for family in TINY_MODELS),
        ("llama", False, "hessian"),
    ],
)
def test_every_family_becomes_a_student(run, tmp_path, family, tied, fit):
    """Without a cache as well; what is written loads and speaks like the model."""
    save_tiny(tmp_path / "m", TINY_MODELS[family](tied=tied))
    done = run("init-student", model=tmp_path / "m", output=tmp_path / "s", fit=fit)
    assert done.code == 0, done.said
    assert done.closing.keys() >= KEYS
    assert not MEASURED & done.closing.keys()
    token_ids = torch.arange(12).view(2, 6)
    expected = load_dense(tmp_path / "m")(token_ids).logits
    found = read_checkpoint(tmp_path / "s")[0](token_ids).logits
    assert (found - expected).norm() < 0.5 * expected.norm()


def test_a_cache_calibrates_without_measuring(run, path, tmp_path):
    """--no-eval leaves the numbers out."""
    flags = {"model": path.teacher, "cache_dir": path.cache, "output": tmp_path / "s"}
    done = run("init-student", eval=False, fit="moments", **flags)
    assert done.code == 0
    assert not MEASURED & done.closing.keys()
    assert read_header(tmp_path / "s").cache_fingerprint is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "no/such/folder"}, "no folder no/such/folder"),
        ({"plan": "q9"}, "plan 'q9' is unknown; write q{MLP bits}a{attention bits}"),
        (
            {"plan": "q4_g48"},
            "mlp=lut4-g48 does not fit model.layers.0.mlp.gate_proj: group size 48",
        ),
        ({"plan": "q4_r500"}, "exceeds the smaller side of a (128, 64) weight; choose at most 64"),
        ({"cache_dir": "no/such/cache"}, "cache no/such/cache does not exist; `qat build-cache`"),
        ({"calibration_sequences": 0}, "--calibration-sequences 0 must be 1 or more"),
        ({"fit": "luck"}, "'luck' for argument '--fit'"),
        ({"dtype": "int8", "device": "cpu"}, "--dtype int8 is not one of auto, fp32, bf16, fp16"),
    ],
)
def test_bad_input_is_one_line(refused, path, tmp_path, flags, message):
    """What, and what to do; nothing is written."""
    flags = {"model": path.teacher, "output": tmp_path / "s", **flags}
    assert message in refused("init-student", **flags)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_another_tokenizer_is_refused(refused, path, tmp_path):
    """Its token ids would mean other words; the field and both values are named."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|another|>"])
    save_tiny(tmp_path / "m", tiny_llama(), tokenizer)
    flags = {"model": tmp_path / "m", "cache_dir": path.cache, "output": tmp_path / "s"}
    assert "the cache has tokenizer_sha256 " in refused("init-student", **flags)


def test_a_cache_of_another_teacher_is_refused(refused, path, tmp_path):
    """The student would learn from a stranger."""
    save_tiny(tmp_path / "m", tiny_llama(seed=7))
    flags = {"model": tmp_path / "m", "cache_dir": path.cache, "output": tmp_path / "s"}
    message = refused("init-student", **flags)
    assert "the cache has teacher_weights " in message
    assert "build a cache with this teacher" in message


def test_what_is_no_student_is_not_replaced(refused, path, tmp_path):
    """A mistyped --output costs nobody a model or notes."""
    shutil.copytree(path.teacher, tmp_path / "model")
    (tmp_path / "notes").write_text("mine")
    for name in ("model", "notes"):
        flags = {"model": path.teacher, "output": tmp_path / name}
        assert "exists and is no student; choose another" in refused("init-student", **flags)
    assert load_dense(tmp_path / "model") is not None
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_student_is_not_quantized_again(refused, path, tmp_path):
    """It is no full-precision model, and says so."""
    flags = {"model": path.q4, "output": tmp_path / "s"}
    assert "is a student; give the full-precision model" in refused("init-student", **flags)
