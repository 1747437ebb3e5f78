"""The runtimes that exported files are run with: each gives the logits of a row of token ids.

Which runtime takes a file is read from the file; one that is not installed or does not load is
named in an error with the command that installs it.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qat.export.gguf_file import read_header, require_vocabulary
from qat.export.llama_cpp import CONTEXT_TOKENS, LlamaCpp, open_library
from qat.export.parity import Runtime
from qat.model.load import require_own_files
from qat.storage.decode import object_in, reading


class RuntimeModel(nn.Module):
    """A runtime in the two halves of a causal LM, so that what measures a student measures it.

    Its logits take the hidden states' place, and its head leaves them as they are.
    """

    def __init__(self, runtime: Runtime):
        super().__init__()
        self.runtime, self.head = runtime, nn.Identity()
        # `forward` keeps documents apart without a mask.
        self.config = SimpleNamespace(_attn_implementation="eager")

    def get_decoder(self) -> nn.Module:
        """Return the half that runs."""
        return self

    def get_output_embeddings(self) -> nn.Module:
        """Return the half that does nothing."""
        return self.head

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, **_options: object
    ) -> SimpleNamespace:
        """Return logits, (B, T, V), of token ids, (B, T), one document after the other."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        rows = [
            torch.cat([torch.from_numpy(self.runtime(part.tolist())) for part in parts])
            for parts in map(split_documents, input_ids, position_ids)
        ]
        return SimpleNamespace(last_hidden_state=torch.stack(rows))


def split_documents(token_ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    """Return the parts of a row, (T,), that begin where a position is 0."""
    return token_ids.tensor_split((positions == 0).nonzero().flatten()[1:].tolist())


def open_runtime(path: Path) -> tuple[str, Runtime]:
    """Return the name of the runtime that runs an exported file or folder, and the runtime.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If no runtime on this machine runs it; says what to install.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"--export {path} does not exist; run `qat export` first")
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise ValueError(
                f"{path} holds no model that runs here (Core ML programs run on macOS only); "
                "name a .gguf file or a folder with a config.json"
            )
        path = files[0]
    if path.suffix == ".gguf":
        return open_gguf(path)
    config = object_in(path / "config.json")
    if "quantization" in config:
        return "mlx-lm", mlx_runtime(path)
    return "transformers", transformers_runtime(path, config)


def open_gguf(path: Path) -> tuple[str, Runtime]:
    """Return the first GGUF runtime installed that knows the file's types."""
    header = read_header(path)
    require_vocabulary(path, header)
    types = {record.type_name for record in header.tensors.values()}
    if "i2_s" in types:
        raise ValueError(f"{path} holds I2_S: bitnet.cpp on x86 runs it, which no package holds")
    if find_spec("xllamacpp"):
        return "llama.cpp", llama_cpp_runtime(path)
    if find_spec("ik_llama_cpp") and "q2_0" not in types:
        return "ik_llama.cpp", ik_llama_runtime(path)
    if "q2_0" in types:
        raise ValueError(
            f"{path} holds Q2_0, which ik_llama.cpp does not run; pip install xllamacpp"
        )
    raise ValueError(f"no runtime for {path}; pip install xllamacpp")


@contextmanager
def loading(distribution: str) -> Iterator[None]:
    """Turn what a broken installation raises at import into an error that names the remedy."""
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:  # llama.cpp's loader raises all of them
        raise ValueError(
            f"{distribution} is installed but does not load ({error}); "
            f"pip install --force-reinstall {distribution}, or uninstall it to use another runtime"
        ) from error


def llama_cpp_runtime(path: Path) -> Runtime:
    """Return llama.cpp on a file."""
    with loading("xllamacpp"):
        open_library()
    return LlamaCpp(path)


def ik_llama_runtime(path: Path) -> Runtime:
    """Return ik_llama.cpp on a file."""
    with loading("ik-llama-cpp-python"):
        from ik_llama_cpp import _ctypes_api as api
        from ik_llama_cpp._internals import IkContext, IkModel, make_batch

    with quiet_output():
        model = IkModel(str(path))
        context = IkContext(model, n_ctx=CONTEXT_TOKENS, flash_attn=False)

    def logits(token_ids: list[int]) -> np.ndarray:
        context.kv_cache_clear()
        batch = make_batch(token_ids)
        for position in range(len(token_ids)):
            batch.logits[position] = 1
        if context.decode(batch):
            raise ValueError(f"ik_llama.cpp refuses {len(token_ids)} tokens of {path}")
        rows = [row_of(context.get_logits(i), model.n_vocab) for i in range(len(token_ids))]
        api.llama_batch_free(batch)
        return np.stack(rows)

    return logits


@contextmanager
def quiet_output() -> Iterator[None]:
    """Send what C code prints on standard output to standard error: standard output is for JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def row_of(pointer: "ctypes._Pointer[ctypes.c_float]", count: int) -> np.ndarray:
    """Return a copy of C floats."""
    address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(address, shape=(count,)).copy()


def mlx_runtime(path: Path) -> Runtime:
    """Return mlx-lm on a folder."""
    if not find_spec("mlx_lm"):
        raise ValueError(f"{path} is for MLX; pip install mlx mlx-cpu mlx-lm (Linux: glibc 2.35)")
    with loading("mlx-lm"):
        import_module("mlx_lm")
    from qat.export.to_mlx import load_runtime

    with reading(path, "export it again"):
        return load_runtime(path)


def transformers_runtime(path: Path, config: dict[str, Any]) -> Runtime:
    """Return transformers on a folder, with the plugin or compressed-tensors where it asks."""
    from transformers import AutoModelForCausalLM

    import qat.export.plugin  # noqa: F401 makes the packed folders' model type known

    packing = config.get("quantization_config")
    if isinstance(packing, dict) and packing.get("quant_method") == "compressed-tensors":
        if not find_spec("compressed_tensors"):
            raise ValueError(f"{path} needs compressed-tensors; pip install compressed-tensors")
        with loading("compressed-tensors"):
            import_module("compressed_tensors")
    with reading(path, "export it again"):
        require_own_files(Path(path))
        model = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=torch.float32, trust_remote_code=False
        ).eval()

    @torch.inference_mode()
    def logits(token_ids: list[int]) -> np.ndarray:
        return model(torch.tensor([token_ids]), use_cache=False).logits[0].float().numpy()

    return logits
