"""What decides a student, when it is found made, and what is told of a change."""

import pytest

from qat.pipelines.place import Place
from qat.pipelines.quantize_config import InitStudentConfig
from qat.pipelines.students import StudentResult, cost, finished, measure, recipe
from tests.tiny import save_student, save_tiny, tiny_llama, tiny_student


def config_of(tmp_path, **changes):
    values = {"model": "m", "output": tmp_path / "s", "device": "cpu", "dtype": "fp32"}
    return InitStudentConfig(**{**values, **changes})


@pytest.fixture
def made(tmp_path):
    """The recipe of a student, and its folder."""
    made_by = recipe("init-student", config_of(tmp_path), base="a", cache=None)
    text_source = save_tiny(tmp_path / "base", tiny_llama())
    folder = save_student(
        tmp_path / "s", tiny_student(), text_source, made_by=made_by, metrics={"seconds": 1.5}
    )
    return made_by, folder


def test_contents_and_settings_decide_a_student_not_places(tmp_path):
    """Another folder or device is the same recipe; another plan or teacher is not."""

    def found(base="a", **changes):
        return recipe("init-student", config_of(tmp_path, **changes), base=base)

    usual = found()
    assert found(model="elsewhere", output=tmp_path / "t", device="auto") == usual
    assert found(plan="q2a4") != usual
    assert found(base="b") != usual
    assert usual["settings"]["fit"] == InitStudentConfig(model="m", output=tmp_path).fit


def test_a_student_of_the_same_recipe_is_found(made, tmp_path):
    """With the numbers that were measured then; nothing there is nothing found."""
    made_by, folder = made
    assert finished(folder, made_by) == StudentResult(folder, {"seconds": 1.5})
    assert finished(tmp_path / "absent", made_by) is None
    (tmp_path / "empty").mkdir()
    assert finished(tmp_path / "empty", made_by) is None


def test_what_was_made_otherwise_is_not_replaced(made, tmp_path):
    """The first setting that differs is named with both values; other files are no student."""
    made_by, folder = made
    other = {**made_by, "settings": {**made_by["settings"], "plan": "q3a3"}}
    with pytest.raises(FileExistsError, match=r"plan \S+ there, q3a3 here\); choose another"):
        finished(folder, other)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is no student"):
        finished(tmp_path / "notes", made_by)
    (tmp_path / "x.pt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"x\.pt is there"):
        finished(tmp_path / "x.pt", made_by)


@pytest.mark.parametrize("name", ["kl_nats", "kl_nats_lower"])
def test_the_cost_of_a_change_is_a_difference(name):
    """Under the name of what was measured; nothing without a cache."""
    absent = {"kl_nats": None, "kl_nats_lower": None}
    told = cost({**absent, name: 0.25}, {**absent, name: 0.75})
    assert told == {f"{name}_before": 0.25, f"{name}_cost": 0.5}
    assert cost({}, {}) == {}


def test_without_a_cache_nothing_is_measured(tmp_path):
    """The student is not even run."""
    assert measure(None, None, Place.of(config_of(tmp_path))) == {}
