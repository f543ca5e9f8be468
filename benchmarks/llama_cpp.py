"""llama.cpp through its C interface, taken from the library inside a Python package.

Only what the benchmarks need: load a file, run tokens given by number, forget the last positions.
Two packages hold it. `llama-cpp-python` is built where it is installed, for this processor
(`CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python`, some 6 minutes on 2 cores), which is
llama.cpp at its best; `xllamacpp` is a ready wheel whose kernels stop at AVX2.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_float,
    c_int32,
    c_uint32,
    c_uint64,
    c_void_p,
    create_string_buffer,
)
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np

from paceline.core import Floats, Tokens

BUILDS = {  # package -> its library, best first
    "llama-cpp-python": "llama_cpp/lib/libllama.*",
    "xllamacpp": "xllamacpp/xllamacpp*.so",
}
_FLAGS = 72  # where the flags of a model's settings lie; the third allows other packings
_LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_silent = _LogCallback(lambda level, text, data: None)


class _ModelParams(ctypes.Structure):
    """Passed on as the library fills it; larger than any version's, which does no harm."""

    _fields_ = (("opaque", ctypes.c_ubyte * 1024),)


class _ContextParams(ctypes.Structure):
    """Starts with the four sizes in every version so far; `_context_params` checks that."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("opaque", ctypes.c_ubyte * 1024),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", c_void_p),
    )


_SIGNATURES = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LogCallback, c_void_p)),
    "llama_print_system_info": (c_char_p, ()),
    "llama_model_default_params": (_ModelParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, _ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_size": (c_uint64, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_tokenize": (
        c_int32,
        (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool),
    ),
    "llama_token_to_piece": (c_int32, (c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool)),
    "llama_context_default_params": (_ContextParams, ()),
    "llama_init_from_model": (c_void_p, (c_void_p, _ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_n_batch": (c_uint32, (c_void_p,)),
    "llama_n_threads": (c_int32, (c_void_p,)),
    "llama_set_n_threads": (None, (c_void_p, c_int32, c_int32)),
    "llama_decode": (c_int32, (c_void_p, _Batch)),
    "llama_synchronize": (None, (c_void_p,)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_seq_rm": (c_bool, (c_void_p, c_int32, c_int32, c_int32)),
}


class Library:
    """The C interface, with its types.

    Args:
        build: one of `BUILDS`; None takes the first that is installed.

    Attributes:
        build: the package and its version.

    Raises:
        SystemExit: no such package, or its interface is not the one known here.
    """

    def __init__(self, build: str | None = None) -> None:
        builds = [build] if build else list(BUILDS)
        found = _find(builds)
        if found is None:
            raise SystemExit(f"llama.cpp is missing: `pip install {' or '.join(builds)}`")
        file, self.build = found
        try:
            self.c = ctypes.CDLL(str(file))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self.c, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise SystemExit(f"{self.build} has another interface: {error}") from None
        self.c.llama_log_set(_silent, None)
        self.c.llama_backend_init()

    @property
    def isa(self) -> str:
        """The widest instruction set that its kernels were compiled for, in our words."""
        flags = self.c.llama_print_system_info().decode()
        known = {"AVX512_VNNI": "avx512vnni", "AVX512": "avx512", "AVX2": "avx2", "NEON": "neon"}
        return next((ours for flag, ours in known.items() if f" {flag} = 1" in flags), "portable")

    def model_params(self, repack: bool) -> _ModelParams:
        """Return the library's default settings, or those that leave weights as they are stored."""
        params: _ModelParams = self.c.llama_model_default_params()
        flags = params.opaque[_FLAGS : _FLAGS + 6]
        if not repack and flags != [0, 0, 1, 0, 0, 0]:
            raise SystemExit(
                f"{self.build} has other model settings than known here: its flags are {flags}, "
                "expected the third alone to be set"
            )
        if not repack:
            params.opaque[_FLAGS + 2] = 0
        return params

    def context_params(self) -> _ContextParams:
        """Return the library's default settings, after checking where their first fields lie."""
        params: _ContextParams = self.c.llama_context_default_params()
        found = (params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max)
        if found != (512, 2048, 512, 1):
            raise SystemExit(
                f"{self.build} has other context settings than known here: its first "
                f"four are {found}, expected (512, 2048, 512, 1)"
            )
        return params


class LlamaCpp:
    """One model and one sequence, with the library's default settings but context and threads.

    Args:
        library: the C interface.
        path: a GGUF file.
        context: positions of the cache.
        threads: for single tokens and batches alike.
        repack: let it pack weights anew, into memory of its own, for faster kernels.
    """

    def __init__(
        self, library: Library, path: Path, context: int, threads: int, repack: bool = True
    ) -> None:
        self._c = library.c
        self._model = self._c.llama_model_load_from_file(
            str(path).encode(), library.model_params(repack)
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = library.context_params()
        params.n_ctx = context
        self._context = self._c.llama_init_from_model(self._model, params)
        if not self._context or self._c.llama_n_ctx(self._context) < context:
            raise SystemExit(f"llama.cpp gives no context of {context} positions")
        self._c.llama_set_n_threads(self._context, threads, threads)
        self._memory = self._c.llama_get_memory(self._context)
        self._vocabulary = self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self._model))
        self.bytes = int(self._c.llama_model_size(self._model))
        self.threads = int(self._c.llama_n_threads(self._context))

    def extend(self, tokens: Tokens, logits: bool) -> Floats | None:
        """Run `tokens` [n] in one call and keep them.

        Returns:
            logits [n, V], valid until the next call; None unless asked for (the last token's are
            computed all the same).
        """
        ids = np.ascontiguousarray(tokens, np.int32)
        wanted = np.ones(len(ids), np.int8)
        batch = _Batch(
            n_tokens=len(ids),
            token=ids.ctypes.data_as(POINTER(c_int32)),
            logits=wanted.ctypes.data if logits else None,
        )
        if status := self._c.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode failed with {status}")
        self._c.llama_synchronize(self._context)
        if not logits:
            return None
        rows = self._c.llama_get_logits(self._context)
        return np.ctypeslib.as_array(rows, (len(ids), self._vocabulary))

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        if not self._c.llama_memory_seq_rm(self._memory, 0, length, -1):
            raise SystemExit("llama.cpp cannot forget positions of this model")

    def close(self) -> None:
        """Give the memory back."""
        self._c.llama_free(self._context)
        self._c.llama_model_free(self._model)


class LlamaCppTokenizer:
    """The tokenizer of a GGUF file.

    Args:
        library: the C interface.
        path: the file.
    """

    def __init__(self, library: Library, path: Path) -> None:
        self._c = library.c
        self._model = self._c.llama_model_load_from_file(
            str(path).encode(), self._c.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self._vocabulary = self._c.llama_model_get_vocab(self._model)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the ids of a text, in which special tokens are recognised.

        Args:
            text: any text.
            special: whether the tokens that begin or end a text are added.
        """
        data = text.encode()
        room = len(data) + 16  # a token has at least one byte, but for the first space and these
        ids = (c_int32 * room)()
        count = self._c.llama_tokenize(self._vocabulary, data, len(data), ids, room, special, True)
        if count < 0:
            raise SystemExit(f"llama_tokenize needs {-count} tokens for {len(data)} bytes")
        return ids[:count]

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token inside a text; special tokens have none."""
        room = 1 << 13
        buffer = create_string_buffer(room)
        count = self._c.llama_token_to_piece(self._vocabulary, token, buffer, room, 0, False)
        if count < 0:
            raise SystemExit(f"token {token} has {-count} bytes, more than {room}")
        return buffer.raw[:count]

    def close(self) -> None:
        """Give the memory back."""
        self._c.llama_model_free(self._model)


def installed(build: str | None = None) -> str | None:
    """Return the package that `Library(build)` would use and its version, or None."""
    found = _find([build] if build else list(BUILDS))
    return found[1] if found else None


def _find(builds: list[str]) -> tuple[Path, str] | None:
    """Return the library of the first installed package, with its name and version."""
    for name in builds:
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        folder, pattern = BUILDS[name].rsplit("/", 1)
        for suffix in (pattern.replace(".*", end) for end in (".so", ".dylib", ".dll")):
            for file in sorted(Path(str(package.locate_file(folder))).glob(suffix)):
                return file, f"{name} {package.version}"
    return None
