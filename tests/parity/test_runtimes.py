"""Exported files run in their runtimes and answer as the student does."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from qat.export.llama_cpp import LlamaCpp
from qat.export.parity import compare_with_runtime
from qat.export.runtimes import ik_llama_runtime, llama_cpp_runtime, open_runtime
from qat.export.to_compressed_tensors import export_to_compressed_tensors
from qat.export.to_coreml import export_to_coreml
from qat.export.to_gguf import export_to_gguf
from qat.export.to_mlx import export_to_mlx
from qat.model.surgery import quantized_layers
from tests.tiny import TINY_MODELS, quantize_plainly, save_tiny, tiny_llama

pytestmark = pytest.mark.parity

PROMPTS = [[72, 68, 65, 220, 66, 64, 83], list(range(20, 60)), [5]]
# Kernels round activations to 8 bits a block; weights are exact, so this is their cost alone.
# Tiny models with spread logits feel it most.
ACTIVATION_COST_NATS = 0.01


@pytest.fixture(scope="module")
def text_source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), tiny_llama())


def unusual_student(family="llama", plan="q2a4", **changes):
    """Return a student whose config has no number that a runtime takes by default."""
    rope = {"rope_type": "default", "rope_theta": 80000.0}
    student = TINY_MODELS[family](rope_parameters=rope, rms_norm_eps=3e-3, **changes)
    return quantize_plainly(student, plan)


def need(module, package):
    if find_spec(module) is None:
        pytest.skip(f"{package} is not installed; `make parity` installs it")


def run(student, path, num_new_tokens=8):
    name, runtime = open_runtime(path)
    return name, compare_with_runtime(student, runtime, PROMPTS, num_new_tokens=num_new_tokens)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "plan",
    [
        "gguf:q4_0",
        "gguf:q4_0, embed=gguf:q4_0",
        "gguf:q4_0, embed=gguf:q8_0",
        "gguf:iq4_nl",
        "gguf:q8_0",
        "gguf:iq4_nl+gguf:q4_0",
    ],
)
def test_packed_gguf_runs(tmp_path, text_source, family, plan):
    """In llama.cpp, and in ik_llama.cpp, which lacks Q2_0."""
    student = unusual_student(family, plan)
    export_to_gguf(student, tmp_path / "a.gguf", text_source=text_source)
    for module, runtime in (("xllamacpp", llama_cpp_runtime), ("ik_llama_cpp", ik_llama_runtime)):
        need(module, module)
        found = compare_with_runtime(
            student, runtime(tmp_path / "a.gguf"), PROMPTS, num_new_tokens=8
        )
        assert found["kl_nats"] < ACTIVATION_COST_NATS
        assert found["top1_agreement"] > 0.85


@pytest.mark.parametrize("plan", ["gguf:q2_0", "gguf:q2_0+gguf:q4_0", "deploy"])
def test_gguf_with_q2_0_runs(tmp_path, text_source, plan):
    """In llama.cpp of 2026-07 or newer."""
    need("xllamacpp", "xllamacpp")
    student = unusual_student("llama", plan)
    export_to_gguf(student, tmp_path / "a.gguf", text_source=text_source)
    name, found = run(student, tmp_path / "a.gguf")
    assert name == "llama.cpp"
    assert found["kl_nats"] < ACTIVATION_COST_NATS


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_gguf_reference_is_the_student(tmp_path, text_source, family, tied):
    """Float16 weights: what is left is their rounding; so keys, names and row orders are right."""
    need("xllamacpp", "xllamacpp")
    student = unusual_student(family, tied=tied)
    export_to_gguf(student, tmp_path / "a.gguf", text_source=text_source, dtype=torch.float16)
    _name, found = run(student, tmp_path / "a.gguf")
    assert found["kl_nats"] < 1e-4
    assert found["top1_agreement"] > 0.95  # kernels round activations to float16: a tie may turn


def test_the_runtime_splits_text_as_the_tokenizer_does(tmp_path, text_source):
    """The `pre` that was found is the right one for the runtime, special tokens included."""
    need("xllamacpp", "xllamacpp")
    from qat.export.gguf_vocabulary import PROBE
    from qat.model.load import load_tokenizer

    export_to_gguf(
        unusual_student("llama", "gguf:q4_0"), tmp_path / "a.gguf", text_source=text_source
    )
    text = f"<|im_start|>user\n{PROBE}<|im_end|>\n"
    ours = load_tokenizer(text_source)(text).input_ids
    runtime = LlamaCpp(tmp_path / "a.gguf")
    assert runtime.tokenize(text, add_special=False, parse_special=True) == ours


def test_the_runtime_reads_on(tmp_path, text_source):
    """Token by token it gives the logits of the whole row, and a new row begins anew."""
    need("xllamacpp", "xllamacpp")
    student = unusual_student("llama", "gguf:q4_0")
    export_to_gguf(student, tmp_path / "a.gguf", text_source=text_source)
    runtime, ids = LlamaCpp(tmp_path / "a.gguf"), [5, 9, 2, 7, 7, 1]
    whole = runtime(ids)
    for _ in range(2):
        runtime.forget()
        found = [runtime.read_on(ids[:3]), *(runtime.read_on([token]) for token in ids[3:])]
        assert np.allclose(np.stack(found), whole[2:], atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "plan", ["deploy", "mlx-2bit-g64+mlx-4bit-g32", "mlx-4bit-g32", "mlx:4bit-g64", "mlx:3bit-g32"]
)
def test_mlx_gives_the_weights_and_the_answers(tmp_path, text_source, family, plan):
    """`mx.dequantize` equals training to the bit; logits differ by the order of sums."""
    need("mlx_lm", "mlx-lm with mlx-cpu")
    import mlx.core as mx

    student = unusual_student(family, plan)
    export_to_mlx(student, tmp_path / "a", text_source=text_source)
    stored = mx.load(str(tmp_path / "a" / "model.safetensors"))
    for name, layer in quantized_layers(student).items():
        found = mx.dequantize(
            *(stored[f"{name}.{part}"] for part in ("weight", "scales", "biases")),
            group_size=layer.spec.group_size,
            bits=layer.spec.bits,
        )
        found = torch.from_numpy(np.array(found.astype(mx.float32)))
        assert torch.equal(found, layer.fake_quantized_weight()), name
    _name, found = run(student, tmp_path / "a")
    assert found["same_answers"] == 1.0
    assert found["max_logit_difference"] < 1e-3


@pytest.mark.parametrize("plan", ["deploy", "w4a16-g32", "w2a16-g64", "gguf:q4_0"])
def test_compressed_tensors_is_the_student(tmp_path, text_source, plan):
    """Through plain `from_pretrained`: weights to the bit, logits to the bit."""
    need("compressed_tensors", "compressed-tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    student = unusual_student("llama", plan)
    export_to_compressed_tensors(student, tmp_path / "a", text_source=text_source)
    _name, found = run(student, tmp_path / "a")
    assert found["max_logit_difference"] == 0.0
    if plan == "deploy":
        return  # transformers 5.23 dequantizes at once with one grid for all layers only
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    for name, layer in quantized_layers(student).items():
        weight = dense.get_submodule(name).weight.float()
        assert torch.equal(weight, layer.fake_quantized_weight()), name


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("plan", ["coreml:lut2+coreml:lut4", "q2a4", "q4a4_r4", "q3a4"])
def test_core_ml_palettes_read_back(tmp_path, text_source, plan, dtype):
    """Per tensor with a scale per row, per group, and low-rank factors."""
    need("coremltools", "coremltools")
    student = unusual_student("llama", plan)
    report = export_to_coreml(student, tmp_path / "a", text_source=text_source, dtype=dtype)
    assert report["exact"] is True
    assert report["tensors_compared"] == len(quantized_layers(student))
