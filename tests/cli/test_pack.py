import json

import pytest

from qat.cache.manifest import BUILDING_FILE
from qat.cli.commands import main
from qat.pipelines.open_cache import open_teacher_cache
from qat.storage.archive import extract_archive
from tests.tiny import tiny_cache


@pytest.mark.recipe
def test_a_packed_cache_is_the_cache(tmp_path, capsys):
    """Out and back, it opens; one that is not whole is not packed."""
    folder = tiny_cache(tmp_path)
    capsys.readouterr()
    assert main("pack", [str(folder)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["archive"] == f"{folder}.tar.lz4"
    back = extract_archive(tmp_path / f"{folder.name}.tar.lz4", tmp_path / "back")
    assert open_teacher_cache(back).fingerprint == open_teacher_cache(folder).fingerprint
    (folder / BUILDING_FILE).write_text("{}")
    assert main("pack", [str(folder)]) == 2
    assert "not whole" in capsys.readouterr().err
