"""`qat export` from flags to closing line, and what its flags refuse."""

import json

import pytest

from qat.cli.commands import main
from qat.export.config import ExportConfig
from qat.pipelines.open_checkpoint import Checkpoint
from tests.tiny import save_student, save_tiny, tiny_llama, tiny_model, tiny_student


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    text_source = save_tiny(folder / "base", tiny_llama())
    model = tiny_student("llama", "deploy")
    return save_student(folder / "deploy", model, text_source, plan="deploy")


@pytest.mark.parametrize("to", ["hf", "hf-quantized", "gguf", "mlx", "compressed-tensors"])
def test_one_student_goes_into_every_format(tmp_path, student, capsys, to):
    """The deploy pair: exact in all of them, with a report, a card and the student's sizes."""
    output = tmp_path / "out"
    assert main("export", ["--checkpoint", str(student), "--to", to, "--output", str(output)]) == 0
    closing = json.loads(capsys.readouterr().out)
    assert closing["exact"] is True
    assert closing["path"] == str(output)
    assert closing["tensors_compared"] >= 14
    assert closing["bits_per_weight_mlp"] == 2.25
    assert (output / "export.json").is_file()
    assert "## How to load it" in (output / "README.md").read_text()


@pytest.mark.recipe
def test_a_single_gguf_file_and_its_dense_reference(tmp_path, student, capsys):
    """Both in one folder; each has a card of its name, the report is the last one's."""
    for name, flags in (("packed", ["--head", "q8_0"]), ("dense", ["--dtype", "fp16"])):
        output = tmp_path / f"{name}.gguf"
        command = ["--checkpoint", str(student), "--to", "gguf", "--output", str(output), *flags]
        assert main("export", command) == 0
        assert json.loads(capsys.readouterr().out)["exact"] is True
        assert output.with_suffix(".md").is_file()
        assert json.loads((tmp_path / "export.json").read_text())["path"] == str(output)


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_an_export_that_was_killed_is_made_again(tmp_path, student, capsys, monkeypatch, name):
    """It was refused as one that exists when killed before its card; a whole one is found."""

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    flags = ["--checkpoint", str(student), "--to", "gguf", "--output", str(tmp_path / name)]
    with monkeypatch.context() as patch:
        patch.setattr("qat.pipelines.export.write_card", stop)
        with pytest.raises(KeyboardInterrupt):
            main("export", flags)
    assert list(tmp_path.iterdir()) == []
    closing = []
    for told in ("to gguf", "is already complete: nothing to do"):
        assert main("export", flags) == 0
        out, err = capsys.readouterr()
        assert told in err
        closing.append(json.loads(out))
    assert closing[0] == closing[1]
    assert main("export", [*flags, "--dtype", "fp16"]) == 2


def test_a_family_that_gguf_lacks_is_refused_before_weights_are_read(tmp_path, capsys, monkeypatch):
    """In one line, with the remedy."""
    folder = save_tiny(tmp_path / "base", tiny_model("cohere"))
    monkeypatch.setattr(Checkpoint, "load", None)
    flags = ["--checkpoint", str(folder), "--to", "gguf", "--dtype", "fp16"]
    assert main("export", [*flags, "--output", str(tmp_path / "a.gguf")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "model type cohere has no tensor map here" in line
    assert "export --to hf" in line


def test_refusals_are_one_line_and_write_nothing(tmp_path, student, capsys):
    """An output that exists, a format that lacks the grid."""
    flags = ["--checkpoint", str(student), "--to", "gguf", "--output"]
    (tmp_path / "there").mkdir()
    assert main("export", [*flags, str(tmp_path / "there")]) == 2
    assert capsys.readouterr().err.strip().endswith("exists; remove it or name another")
    text_source = save_tiny(tmp_path / "base", tiny_llama())
    learned = save_student(tmp_path / "learned", tiny_student(), text_source)
    for to in ("gguf", "mlx", "compressed-tensors"):
        output = tmp_path / "out" / to
        assert (
            main("export", ["--checkpoint", str(learned), "--to", to, "--output", str(output)]) == 2
        )
        assert "qat convert --plan" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [{"to": "mlx"}, {"to": "gguf", "dtype": "fp16"}])
def test_a_head_type_belongs_to_packed_gguf_files(tmp_path, flags):
    """A flag that would be ignored is refused."""
    with pytest.raises(ValueError, match="--head q8_0 is for packed gguf files"):
        ExportConfig(checkpoint="a", output=tmp_path, head="q8_0", **flags)
