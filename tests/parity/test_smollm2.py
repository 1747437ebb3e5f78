"""SmolLM2-135M through every format once: exact files, and runtimes that answer as it does."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from qat.cli.commands import main

pytestmark = pytest.mark.parity

MODEL = Path(__file__).parents[2] / "models" / "smollm2-135m"
PROMPTS = (
    "The capital of Germany is",
    "A lake is a body of water that",
    "In 2024, 37 people wrote: it isn't easy to",
    "def square(x):\n    return",
)


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Two students, fitted without calibration: near enough to speak, and quick to make."""
    if not MODEL.is_dir():
        pytest.skip(f"{MODEL.name} is not there; `qat fetch smollm2` makes it")
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "prompts.txt").write_text("\n".join(text.splitlines()[0] for text in PROMPTS))
    for plan in ("deploy", "gguf:iq4_nl+gguf:q4_0"):
        flags = ["--model", str(MODEL), "--plan", plan, "--output", str(folder / plan)]
        assert main("init-student", [*flags, "--fit", "moments"]) == 0
    return folder


def closing(capsys, command, *flags):
    capsys.readouterr()
    assert main(command, [str(flag) for flag in flags]) == 0
    return json.loads(capsys.readouterr().out)


def exported(capsys, students, plan, output, *flags):
    """Export and return what its closing line says."""
    checkpoint = ("--checkpoint", students / plan)
    report = closing(capsys, "export", *checkpoint, "--output", output, *flags)
    assert report["exact"] is True
    return report


def distance(capsys, students, plan, output):
    """Return what the parity command says of an export."""
    flags = ("--checkpoint", students / plan, "--export", output)
    prompts = ("--prompts", students / "prompts.txt", "--num-new-tokens", 4)
    return closing(capsys, "parity", *flags, *prompts)


@pytest.mark.parametrize("target", ["compressed-tensors", "mlx", "hf-quantized"])
def test_folders(tmp_path, students, capsys, target):
    """The deploy pair: exact weights, so logits differ by the order of sums alone."""
    if target == "mlx" and find_spec("mlx_lm") is None:
        pytest.skip("mlx-lm is not installed; `make parity` installs it")
    if target == "compressed-tensors" and find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed; `make parity` installs it")
    exported(capsys, students, "deploy", tmp_path / "a", "--to", target)
    found = distance(capsys, students, "deploy", tmp_path / "a")
    assert found["kl_nats"] < (0.01 if target == "mlx" else 1e-6)


def test_core_ml(tmp_path, students, capsys):
    """All palettes read back equal."""
    if find_spec("coremltools") is None:
        pytest.skip("coremltools is not installed; `make parity` installs it")
    report = exported(capsys, students, "deploy", tmp_path / "a", "--to", "coreml")
    assert report["tensors_compared"] == 210


def test_gguf_has_the_size_that_is_promised(tmp_path, students, capsys):
    """Within one part in a hundred of bits per weight, keys and vocabulary apart."""
    for plan in ("deploy", "gguf:iq4_nl+gguf:q4_0"):
        report = exported(capsys, students, plan, tmp_path / f"{plan}.gguf", "--to", "gguf")
        num_weights = 134515008
        expected = report["bits_per_weight_model"] * num_weights / 8
        vocabulary = 2_000_000  # tokens, types and merges
        assert abs(report["file_bytes"] - vocabulary - expected) < 0.01 * expected


@pytest.mark.parametrize("flags", [(), ("--head", "q8_0"), ("--dtype", "fp16")])
def test_gguf_runs(tmp_path, students, capsys, flags):
    """Packed and dense; what packed files cost is the rounding of activations in kernels."""
    if find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed; `make parity` installs it")
    plan = "gguf:iq4_nl+gguf:q4_0"
    exported(capsys, students, plan, tmp_path / "a.gguf", "--to", "gguf", *flags)
    found = distance(capsys, students, plan, tmp_path / "a.gguf")
    assert found["kl_nats"] < (1e-3 if "fp16" in flags else 0.02)


def test_gguf_with_q2_0_runs(tmp_path, students, capsys):
    """The deploy pair in llama.cpp.

    Without calibration 2 bits leave a student that turns the 8 bits of activations in kernels into
    0.07 nats; written dense, the same weights come to 1e-4.
    """
    if find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed; `make parity` installs it")
    exported(capsys, students, "deploy", tmp_path / "a.gguf", "--to", "gguf")
    assert distance(capsys, students, "deploy", tmp_path / "a.gguf")["kl_nats"] < 0.15
