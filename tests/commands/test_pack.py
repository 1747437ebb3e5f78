import json

from qat.archive import extract_archive
from qat.cache.manifest import BUILDING_FILE
from qat.cache.read import TeacherCache
from qat.commands.pack import main
from tests.tiny import tiny_cache


def test_a_packed_cache_is_the_cache(tmp_path, capsys):
    """Out and back, it opens; one that is not whole is not packed."""
    folder = tiny_cache(tmp_path)
    capsys.readouterr()
    assert main([str(folder)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["archive"] == f"{folder}.tar.lz4"
    back = extract_archive(tmp_path / f"{folder.name}.tar.lz4", tmp_path / "back")
    assert TeacherCache.open(back).fingerprint == TeacherCache.open(folder).fingerprint
    (folder / BUILDING_FILE).write_text("{}")
    assert main([str(folder)]) == 2
    assert "not whole" in capsys.readouterr().err
