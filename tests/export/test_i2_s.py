"""BitNet's I2_S: -1, 0 and 1 with one scale for the whole tensor, as bitnet.cpp reads it."""

import ctypes
import struct
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qat.export.gguf_file import read_bytes, read_tail, read_tensor_records, read_weight
from qat.export.gguf_size import planned_file_bytes
from qat.export.gguf_tensors import row_order
from qat.export.to_gguf import export_to_gguf
from qat.model.surgery import quantized_layers, quantized_tensor, thaw_indices
from qat.quant.fit import fit_weight
from qat.quant.hessian import fit_with_hessian, hessian_error
from qat.quant.spec import FORMATS, TensorSpec
from qat.train.step import drop_unseen
from tests.tiny import plan_of, save_tiny, tiny_llama, tiny_student

SPEC = FORMATS["gguf:i2_s"]
PLAN = "linears=gguf:i2_s"
SIZES = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A student whose scales moved by different gradients, and its file."""
    folder = tmp_path_factory.mktemp("i2_s")
    source, student = save_tiny(folder / "base", tiny_llama()), tiny_student("llama", PLAN, **SIZES)
    for layer in quantized_layers(student).values():
        thaw_indices(layer)
        layer.requires_grad_(True)
        (layer.fake_quantized_weight() * torch.randn(layer.weight.shape)).sum().backward()
        with torch.no_grad():
            layer.scale -= 1e-3 * layer.scale.grad.sign()
    path = folder / "out.gguf"
    assert export_to_gguf(student, path, text_source=source)["exact"] is True
    return student, path, source


def by_definition(data: bytes, count: int) -> list[float]:
    """Return a tensor's weights one at a time: element j of 128 in byte j % 32, from the top."""
    (scale,) = struct.unpack_from("<f", data, count // 4)
    weights = []
    for j in range(count):
        byte = data[32 * (j // 128) + j % 32]
        weights.append(((byte >> (6 - 2 * (j % 128 // 32)) & 3) - 1) * scale)
    return weights


def test_files_hold_what_was_trained(exported):
    """To the bit by the type's definition, in the bytes that the plan says."""
    student, path, source = exported
    records = read_tensor_records(path)
    record = records["blk.1.attn_q.weight"]
    assert record.type_name == "i2_s"
    data = read_bytes(path, record).numpy().tobytes() + read_tail(path, record)
    assert len(data) == 256 * 256 // 4 + 32
    trained = student.get_submodule("model.layers.1.self_attn.q_proj").fake_quantized_weight()
    trained = trained[row_order(student.config, "model.layers.1.self_attn.q_proj.weight")].detach()
    assert torch.equal(torch.tensor(by_definition(data, 256 * 256)).view(256, 256), trained)
    assert torch.equal(read_weight(path, record), trained)
    assert len(trained.abs().unique()) == 2  # zero and the scale
    plan = plan_of(student, f"{PLAN}, embed=f16")
    assert planned_file_bytes(student.config, plan, text_source=source) == path.stat().st_size


@pytest.mark.parity
def test_c_gives_the_weights_of_training(exported):
    """By ik_llama.cpp's reader of bitnet.cpp's files."""
    found = find_spec("ik_llama_cpp")
    if found is None:
        pytest.skip("ik-llama-cpp-python is not installed; `make parity` installs it")
    library = ctypes.CDLL(str(Path(found.origin).parent / "lib" / "libggml.so"))
    _, path, _ = exported
    record = read_tensor_records(path)["blk.0.ffn_down.weight"]
    data = read_bytes(path, record).numpy().tobytes() + read_tail(path, record)
    made = torch.empty(record.shape)
    count = ctypes.c_int64(made.numel())
    library.dequantize_row_ms_i2s(data, ctypes.c_void_p(made.data_ptr()), count)
    assert torch.equal(made, read_weight(path, record))


def test_rows_share_one_scale_whatever_pulls_at_them():
    """Each row's gradient is the mean's, so that they stay alike; a file's number stays itself."""
    scale = torch.full((5, 1), 0.123).half().float().requires_grad_()
    full, _ = SPEC.scale.expand({"scale": scale}, lambda values: values)
    assert torch.equal(full, scale)
    (full * torch.arange(5.0).view(5, 1)).sum().backward()
    assert torch.allclose(scale.grad, torch.full((5, 1), 10 / 5))


def test_the_fit_finds_weights_on_the_grid_and_lowers_the_error_otherwise():
    """One scale; against H the error is less than that of a fit by second moments."""
    values = torch.randint(3, (6, 256)) - 1.0
    assert torch.equal(fit_weight(0.25 * values, SPEC).dequantize(), 0.25 * values)
    weight, inputs = torch.randn(40, 128), torch.randn(500, 128) @ torch.randn(128, 128)
    hessian = inputs.T @ inputs / 500
    plain = fit_weight(weight, SPEC, importance=hessian.diagonal())
    fitted = fit_with_hessian(weight, SPEC, hessian)
    assert len(fitted.scale.unique()) == len(plain.scale.unique()) == 1
    errors = [hessian_error(weight, one, hessian) for one in (fitted, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_what_it_cannot_hold_is_refused():
    """Rows that are no whole blocks; other grids by name."""
    with pytest.raises(ValueError, match=r"rows of 192 weights are no multiple of 128"):
        SPEC.check((4, 192))
    with pytest.raises(ValueError, match="use int-row"):
        TensorSpec.from_name("int4-tensor")
    assert TensorSpec.from_name("ternary2-tensor") == SPEC


def test_what_a_checkpoint_holds_is_what_was_trained():
    """Rows that drifted apart come back as the one number that training computed with."""
    student = tiny_student("llama", PLAN, **SIZES)
    layer = next(iter(quantized_layers(student).values()))
    layer.scale.data *= 1 + 1e-3 * torch.randn_like(layer.scale)
    trained, stored = layer.fake_quantized_weight().detach(), quantized_tensor(layer)
    assert len(stored.scale.unique()) == 1
    assert torch.equal(stored.dequantize(), trained)
    layer.scale.grad = torch.ones_like(layer.scale)
    drop_unseen(layer, torch.zeros(layer.out_features))
    assert layer.scale.grad.all()  # it belongs to no row
