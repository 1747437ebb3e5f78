"""llama.cpp's own quantizer: the files that a user has without this package, as peers.

It is that of ik_llama.cpp, llama.cpp's fork for quantization. The wheel of `ik-llama-cpp-python`
holds `llama-quantize` and its library. An importance matrix is the mean square of each input by the
tensor's name, in the form that the program reads since 2024: the number of entries; for each its
name, a count of calls and sums of so many; little-endian.
"""

import struct
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from qat.storage.files import atomic_file

PACKAGE = "ik-llama-cpp-python"
NUM_CALLS = 1


def find_quantizer() -> Path:
    """Return llama.cpp's quantizer.

    Raises:
        ValueError: If it is not installed; says how to get it.
    """
    found = find_spec("ik_llama_cpp")
    for folder in found.submodule_search_locations if found else ():
        if (path := Path(folder) / "bin" / "llama-quantize").is_file():
            return path
    raise ValueError(f"llama.cpp's quantizer is not installed; pip install {PACKAGE}")


def write_importance_matrix(path: Path, moments: Mapping[str, Tensor]) -> None:
    """Write the mean square of each input, (I,), by the name of the tensor in the file."""
    parts = [struct.pack("<i", len(moments))]
    for name, moment in moments.items():
        text, values = name.encode(), moment.float() * NUM_CALLS
        parts += [struct.pack("<i", len(text)), text, struct.pack("<ii", NUM_CALLS, len(values))]
        parts.append(values.cpu().numpy().astype("<f4").tobytes())
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"".join(parts))


def quantize_file(
    dense: Path, output: Path, file_type: str, *, embedding_type: str, importance: Path
) -> None:
    """Write llama.cpp's quantization of a dense GGUF file.

    Args:
        dense: The model in 16 bits.
        output: The file to make.
        file_type: Such as IQ4_NL: of every matrix whose rows it divides. The program's mixes of
            types have some that no other program reads.
        embedding_type: Of the token embedding, such as iq4_nl.
        importance: As `write_importance_matrix` writes it.

    Raises:
        ValueError: If the program is not installed or fails; its last lines are told.
    """
    program, options = find_quantizer(), ["--pure", "--token-embedding-type", embedding_type]
    with atomic_file(output) as temporary:
        command = [program, "--imatrix", importance, *options, dense, temporary, file_type]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            told = " ".join((done.stdout + done.stderr).split("\n")[-5:])
            raise ValueError(f"llama.cpp's quantizer fails on {dense} to {file_type}: {told}")
