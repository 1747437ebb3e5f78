"""Quantize a model by one other program, to the numbers that its runtime multiplies with.

    python speedrun/environments/peer.py JOB.json

It runs in an environment of that program alone, which `speedrun/peers.py` makes, and imports
nothing of ours. A job names the program, model, blocks of tokens, bits and group of each part, and
the output: a Hugging Face folder whose quantized weights are plain float32 numbers, or a folder
with a file for llama.cpp.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import is_torchvision_available

ATTENTION = "self_attn"
Formats = dict[str, tuple[int, int]]
"""Bits and group of each linear, by its name."""


def linear_formats(model: nn.Module, job: dict) -> Formats:
    """Return bits and group of the linears in decoder layers."""
    return {
        name: tuple(job["attention" if ATTENTION in name else "mlp"])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


def take_hqq(model: nn.Module, _blocks: Tensor, formats: Formats, _job: dict) -> None:
    """Half-quadratic quantization: no data; a scale and an offset of 16 bits a group."""
    from hqq.core.quantize import Quantizer

    for name, (bits, group) in formats.items():
        weight = model.get_submodule(name).weight
        codes, meta = Quantizer.quantize(
            weight.data,
            nbits=bits,
            group_size=group,
            axis=1,
            device="cpu",
            compute_dtype=torch.float32,
        )
        weight.data = Quantizer.dequantize(codes, meta).float()


def auto_round(model: nn.Module, blocks: Tensor, formats: Formats, job: dict) -> Any:
    """Return AutoRound on the blocks: rounding and clipping learned by signed gradients."""
    from auto_round import AutoRound

    rows = [
        {"input_ids": block[None], "attention_mask": torch.ones_like(block[None])}
        for block in blocks[: job["samples"]]
    ]
    own = {
        name: {"bits": bits, "group_size": group, "sym": True}
        for name, (bits, group) in formats.items()
    }
    bits, group = job["mlp"]
    return AutoRound(
        model,
        tokenizer=transformers.AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False),
        **({} if job["gguf"] else {"bits": bits, "group_size": group, "sym": True}),
        layer_config=None if job["gguf"] else own,
        dataset=rows,
        iters=job["iters"],
        nsamples=len(rows),
        seqlen=blocks.shape[1],
        batch_size=job["batch_size"],
        device_map="cpu",
        enable_torch_compile=False,
        seed=job["seed"],
    )


def take_auto_round(model: nn.Module, blocks: Tensor, formats: Formats, job: dict) -> None:
    """Decoder layer by decoder layer; a scale of 16 bits a group."""
    rounded, _ = auto_round(model, blocks, formats, job).quantize()
    for name in formats:
        model.get_submodule(name).weight.data = rounded.get_submodule(name).weight.data.float()


def write_auto_round_gguf(model: nn.Module, blocks: Tensor, formats: Formats, job: dict) -> None:
    """All of the model in a format of llama.cpp."""
    rounder = auto_round(model, blocks, formats, job)
    rounder.quantize_and_save(job["output"], format=f"gguf:{job['gguf']}")


def take_gptqmodel(model: nn.Module, blocks: Tensor, formats: Formats, job: dict) -> None:
    """GPTQ with a scale and an integer offset a group."""
    # It imports torchvision for models of images, whose wheel on PyPI wants torch for CUDA.
    if not is_torchvision_available():
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            sys.modules[name] = MagicMock()
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it refuses to run with one, on two cores
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    bits, group = job["mlp"]
    own = {f"+:.*{ATTENTION}.*": dict(zip(("bits", "group_size"), job["attention"], strict=True))}
    config = QuantizeConfig(bits=bits, group_size=group, sym=False, dynamic=own, device="cpu")
    quantizer = GPTQModel.load(job["model"], config)
    rows = [
        {"input_ids": block.tolist(), "attention_mask": [1] * len(block)}
        for block in blocks[: job["samples"]]
    ]
    quantizer.quantize(rows, batch_size=job["batch_size"])
    with TemporaryDirectory() as folder:
        quantizer.save(folder)
        packed = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH)
        for name in formats:
            weight = packed.model.get_submodule(name).dequantize_weight()
            model.get_submodule(name).weight.data = weight.T.float().contiguous()


def take_torchao(model: nn.Module, blocks: Tensor, formats: Formats, job: dict) -> None:
    """Quantization-aware training of all linears against the model's logits, for some minutes."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    for kept in set(formats.values()):
        bits, group = kept
        rounding = IntxFakeQuantizeConfig(
            getattr(torch, f"int{bits}"), group_size=group, is_symmetric=True
        )
        quantize_(
            model,
            QATConfig(weight_config=rounding, step="prepare"),
            filter_fn=lambda _module, name, kept=kept: formats.get(name) == kept,
        )
    teacher = load_model(job["model"])
    distil(model, teacher, [model.get_submodule(name).weight for name in formats], blocks, job)
    for name in formats:
        layer = model.get_submodule(name)
        with torch.no_grad():
            layer.weight.data = layer.weight_fake_quantizer(layer.weight)
        layer.weight_fake_quantizer = None
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight, plain.bias = layer.weight, layer.bias
        model.set_submodule(name, plain)


def distil(
    model: nn.Module, teacher: nn.Module, weights: list[Tensor], blocks: Tensor, job: dict
) -> None:
    """Train weights by AdamW on the KL to the teacher; the rate falls to zero as time ends."""
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=job["lr"], weight_decay=0.0)
    order = torch.Generator().manual_seed(job["seed"])
    started, seconds = time.perf_counter(), 60 * job["minutes"]
    while (past := (time.perf_counter() - started) / seconds) < 1:
        picked = torch.randint(len(blocks), (job["batch_size"],), generator=order)
        batch = blocks[picked]
        with torch.no_grad():
            likely = teacher(batch).logits.flatten(0, 1).log_softmax(-1)
        found = model(batch).logits.flatten(0, 1).log_softmax(-1)
        nn.functional.kl_div(found, likely, log_target=True, reduction="batchmean").backward()
        for group in optimizer.param_groups:
            group["lr"] = job["lr"] * (1 - past)
        optimizer.step()
        optimizer.zero_grad()


TAKEN: dict[str, Callable[[nn.Module, Tensor, Formats, dict], None]] = {
    "auto-round": take_auto_round,
    "auto-round-gguf": write_auto_round_gguf,
    "gptqmodel": take_gptqmodel,
    "hqq": take_hqq,
    "torchao": take_torchao,
}


def load_model(folder: str) -> nn.Module:
    """Return a model in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()


def main() -> None:
    """Do the job of the file that is named."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(job["seed"])
    model = load_model(job["model"])
    blocks, formats = load_file(job["blocks"])["blocks"], linear_formats(model, job)
    TAKEN[job["peer"]](model, blocks, formats, job)
    if not job["gguf"]:
        model.save_pretrained(job["output"])
        transformers.AutoTokenizer.from_pretrained(
            job["model"], trust_remote_code=False
        ).save_pretrained(job["output"])


if __name__ == "__main__":
    main()
