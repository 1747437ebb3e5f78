"""Each family's GGUF file answers in llama.cpp as the student does."""

import pytest
import torch

from qat.export.llama_cpp import LlamaCpp
from qat.export.parity import compare_with_runtime
from qat.export.to_gguf import export_to_gguf
from tests.export.test_gguf_family import NAMES, family_model
from tests.parity.test_runtimes import ACTIVATION_COST_NATS, need
from tests.tiny import quantize_plainly, save_tiny, tiny_llama

pytestmark = pytest.mark.parity

PROMPTS = [[72, 68, 65, 220, 66, 64, 83], list(range(20, 100)), [5]]  # beyond the tiny windows
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "rms_norm_eps": 3e-3}
WIDE["initializer_range"] = 0.1  # wider rows at 0.2 spread logits so far that kernels differ
DEPTHS = {"smollm3": 5, "gemma3": 7}  # a layer without positions; one that sees everything
SCALES = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2}
OWN = {
    "granite": SCALES,
    "gemma2": {"query_pre_attn_scalar": 64},
    "gemma3": {"query_pre_attn_scalar": 64},
}
THETA = {"rope_theta": 5000.0}
LINEAR = {**THETA, "rope_type": "linear", "factor": 4.0}
YARN = {
    **THETA,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "attention_factor": 1.3,
    "beta_fast": 20.0,
    "beta_slow": 2.0,
}
LLAMA3 = {
    **THETA,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONG = {
    **THETA,
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * place for place in range(4)],
    "long_factor": [2.0 + 0.3 * place for place in range(4)],
    "original_max_position_embeddings": 512,
    "partial_rotary_factor": 0.5,
}
WHOLE = {**LONG, "short_factor": [1.5] * 8, "long_factor": [3.0] * 8, "partial_rotary_factor": 1.0}
SLIDING = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", **THETA}}


@pytest.fixture(scope="module")
def text_source(tmp_path_factory):
    need("xllamacpp", "xllamacpp")
    return save_tiny(tmp_path_factory.mktemp("base"), tiny_llama())


def compare(model, tmp_path, text_source, **options):
    """Export a model and return how far llama.cpp is from it."""
    export_to_gguf(model, tmp_path / "a.gguf", text_source=text_source, **options)
    runtime = LlamaCpp(tmp_path / "a.gguf")
    return compare_with_runtime(model, runtime, PROMPTS, num_new_tokens=4)


@pytest.mark.parametrize("plan", [None, "all=gguf:q4_0, embed=gguf:q8_0"])
@pytest.mark.parametrize("family", NAMES)
def test_each_family_answers_as_the_student(tmp_path, text_source, family, plan):
    """Dense in float32, what is left is the runtime's float16 cache; packed, its activations."""
    changes = {"num_hidden_layers": DEPTHS.get(family, 2), **WIDE, **OWN.get(family, {})}
    model = family_model(family, **changes)
    if plan is None:
        found = compare(model, tmp_path, text_source, dtype=torch.float32)
        assert found["kl_nats"] < 1e-4
        assert found["top1_agreement"] > 0.95
    else:
        found = compare(quantize_plainly(model, plan), tmp_path, text_source)
        assert found["kl_nats"] < ACTIVATION_COST_NATS


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", LINEAR),
        ("qwen2", YARN),
        ("smollm3", YARN),
        ("olmo2", YARN),
        ("llama", LLAMA3),
        ("granite", LLAMA3),
        ("llama", WHOLE),
        ("phi3", LONG),
        ("gemma3", SLIDING),
    ],
)
def test_positions_are_scaled_as_the_model_scales_them(tmp_path, text_source, family, rope):
    """Every kind, with numbers that no runtime takes by default."""
    changes = {"max_position_embeddings": 2048}
    if family == "phi3":
        changes["original_max_position_embeddings"] = 512
    model = family_model(
        family, rope_parameters=rope, num_hidden_layers=DEPTHS.get(family, 2), **changes
    )
    found = compare(model, tmp_path, text_source, dtype=torch.float32)
    assert found["kl_nats"] < 1e-4
