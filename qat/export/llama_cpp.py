"""llama.cpp through its C interface, from the one library that `xllamacpp`'s wheel holds.

The wheel's own Python gives no logits of a prompt, but its library exports all of llama.h.
"""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

CONTEXT_TOKENS = 512  # of all GGUF runtimes: prompts and answers of a parity check are short
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
ERROR = 4  # the level of a message
MESSAGES: list[str] = []  # of that level, the last ones last


@LOG  # C keeps the pointer, so it must outlive calls
def keep_errors(level: int, text: bytes, _data: int) -> None:
    """Keep what says why a file does not load; leave the rest out."""
    if level == ERROR:
        MESSAGES.append(text.decode(errors="replace").strip())


class Parameters(ctypes.Structure):
    """Parameters of a model or a context, whose fields change between releases.

    C fills and reads the front; the first three of a context have been n_ctx, n_batch and n_ubatch
    since 2024. The room is several times what either takes.
    """

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class Batch(ctypes.Structure):
    """Tokens to decode; positions that are not given count from what the context holds."""

    _fields_ = [
        ("num_tokens", ctypes.c_int32),
        ("tokens", ctypes.POINTER(ctypes.c_int32)),
        ("embeddings", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("num_sequences", ctypes.c_void_p),
        ("sequences", ctypes.c_void_p),
        ("outputs", ctypes.POINTER(ctypes.c_int8)),
    ]


SIGNATURES = {
    "llama_model_default_params": (Parameters,),
    "llama_context_default_params": (Parameters,),
    "llama_model_load_from_file": (ctypes.c_void_p, ctypes.c_char_p, Parameters),
    "llama_init_from_model": (ctypes.c_void_p, ctypes.c_void_p, Parameters),
    "llama_free": (None, ctypes.c_void_p),
    "llama_model_free": (None, ctypes.c_void_p),
    "llama_set_n_threads": (None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32),
    "llama_get_memory": (ctypes.c_void_p, ctypes.c_void_p),
    "llama_memory_clear": (None, ctypes.c_void_p, ctypes.c_bool),
    "llama_model_get_vocab": (ctypes.c_void_p, ctypes.c_void_p),
    "llama_vocab_n_tokens": (ctypes.c_int32, ctypes.c_void_p),
    "llama_decode": (ctypes.c_int32, ctypes.c_void_p, Batch),
    "llama_get_logits_ith": (
        ctypes.POINTER(ctypes.c_float),
        ctypes.c_void_p,
        ctypes.c_int32,
    ),
    "llama_tokenize": (
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_int32,
        ctypes.POINTER(ctypes.c_int32),
        ctypes.c_int32,
        ctypes.c_bool,
        ctypes.c_bool,
    ),
}


@cache
def open_library() -> ctypes.CDLL:
    """Return llama.cpp's library, its functions typed and its messages off."""
    found = find_spec("xllamacpp")
    if found is None:
        raise ImportError("xllamacpp is not installed")
    (folder,) = found.submodule_search_locations
    file = next(Path(folder).glob("xllamacpp*.so"), None)
    if file is None:
        raise ImportError(f"{folder} holds no library")
    library = ctypes.CDLL(str(file))
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(keep_errors, None)
    library.llama_backend_init()
    return library


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: Path):
        self.library = library = open_library()
        MESSAGES.clear()
        parameters = library.llama_context_default_params()
        parameters.words[:3] = [CONTEXT_TOKENS] * 3
        self.model = library.llama_model_load_from_file(
            str(path).encode(), library.llama_model_default_params()
        )
        if not self.model:
            reason = "; ".join(MESSAGES)
            raise ValueError(f"llama.cpp does not load {path} ({reason}); export it again")
        self.context = library.llama_init_from_model(self.model, parameters)
        threads = torch.get_num_threads()
        library.llama_set_n_threads(self.context, threads, threads)
        self.vocabulary = library.llama_model_get_vocab(self.model)
        self.num_tokens = library.llama_vocab_n_tokens(self.vocabulary)

    def __del__(self):
        """Free what C holds."""
        if getattr(self, "context", None):
            self.library.llama_free(self.context)
        if getattr(self, "model", None):
            self.library.llama_model_free(self.model)

    def __call__(self, token_ids: list[int]) -> np.ndarray:
        """Return the logits of T token ids, (T, V) float32."""
        self.forget()
        self.decode(token_ids, [1] * len(token_ids))
        return np.stack([self.logits(place) for place in range(len(token_ids))])

    def read_on(self, token_ids: list[int]) -> np.ndarray:
        """Return the logits after T token ids, (V,) float32, which go on from what was read."""
        self.decode(token_ids, [0] * (len(token_ids) - 1) + [1])
        return self.logits(len(token_ids) - 1)

    def forget(self) -> None:
        """Begin anew."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def decode(self, token_ids: list[int], wants_logits: list[int]) -> None:
        """Read T token ids after those that were read; logits are kept where wanted, (T,)."""
        count = len(token_ids)
        tokens = (ctypes.c_int32 * count)(*token_ids)
        outputs = (ctypes.c_int8 * count)(*wants_logits)
        if self.library.llama_decode(
            self.context, Batch(num_tokens=count, tokens=tokens, outputs=outputs)
        ):
            raise ValueError(f"llama.cpp refuses a row of {count} tokens")

    def logits(self, place: int) -> np.ndarray:
        """Return the logits of a token of the last row that was read, (V,)."""
        row = self.library.llama_get_logits_ith(self.context, place)
        return np.ctypeslib.as_array(row, (self.num_tokens,)).copy()

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: Any.
            add_special: Put the first and last tokens that the file asks for.
            parse_special: Read the names of control tokens as those tokens.
        """
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 8))()
        count = self.library.llama_tokenize(
            self.vocabulary, raw, len(raw), room, len(room), add_special, parse_special
        )
        return room[:count]
