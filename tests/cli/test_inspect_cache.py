import json

import pytest

from qat.cli.commands import main
from tests.tiny import tiny_cache

pytestmark = pytest.mark.recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_cache(tmp_path_factory.mktemp("cache"))


def test_it_tells_what_the_cache_holds(folder, tmp_path, capsys):
    """Numbers in the closing line, a decoded sample for people, a picture."""
    plot = tmp_path / "a.png"
    assert (
        main(
            "inspect-cache",
            [str(folder), "--teacher", str(folder.parent / "teacher"), "--plot", str(plot)],
        )
        == 0
    )
    said = capsys.readouterr()
    values = json.loads(said.out)
    assert values["content"] == "top-k"
    assert values["bytes_per_token"] > sum(values["bytes_per_token_by_field"].values())
    assert "sequence 0: " in said.err
    assert "->" in said.err
    assert plot.stat().st_size > 0


def test_without_a_tokenizer_ids_are_shown(folder, capsys):
    """And a sequence that is not there is refused."""
    assert main("inspect-cache", [str(folder), "--sequence", "2"]) == 0
    assert "->" in capsys.readouterr().err
    assert main("inspect-cache", [str(folder), "--sequence", "9999"]) == 2
    assert "--sequence 9999" in capsys.readouterr().err
