"""A rehearsal of training: seconds, and nothing left behind."""

import pytest

from qat.model.load import model_identity
from qat.pipelines.step_time import rehearse_training
from qat.storage.files import sha256_of_file
from qat.train.config import TrainConfig
from tests.tiny import save_student, tiny_cache, tiny_student


@pytest.mark.recipe
def test_a_rehearsal_tells_seconds_and_leaves_nothing(tmp_path):
    """The student's folder is as before, and no run is there."""
    cache = tiny_cache(tmp_path)
    teacher = tmp_path / "teacher"
    base = {"path": str(teacher), **model_identity(str(teacher))}
    student = save_student(tmp_path / "student", tiny_student(), teacher, base_model=base)
    before = {path.name: sha256_of_file(path) for path in student.iterdir()}
    settings = TrainConfig(
        checkpoint=student,
        cache_dir=cache,
        output_dir=tmp_path / "run",
        batch_size=2,
        device="cpu",
        dtype="fp32",
    )
    assert 0 < rehearse_training(settings) < 60
    assert {path.name: sha256_of_file(path) for path in student.iterdir()} == before
    assert not (tmp_path / "run").exists()
