"""Every engine behind one small interface: a sequence that grows and shrinks.

A peer that is not installed is left out by default and refused where it is asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, Protocol

import gguf_file
import numpy as np
import openvino_llama
import transformers_llama
from llama_cpp import Library, LlamaCpp, installed

from paceline import _native
from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.native import NativeEngine
from paceline.models.config import ModelConfig

WHEEL = "xllamacpp"  # llama.cpp again, as the ready wheel of that name
PEERS = {
    "llama.cpp": installed,
    WHEEL: lambda: installed(WHEEL),
    "openvino": openvino_llama.build,
    "transformers": transformers_llama.build,
}  # name -> the package and its version, None where it is missing
GGUF = ("llama.cpp", WHEEL)  # those that read GGUF files


class Runner(Protocol):
    """What the benchmarks ask of an engine.

    Attributes:
        bytes: the matrices that a pass reads.
    """

    bytes: int

    def extend(self, tokens: Tokens, logits: bool) -> Floats | None: ...
    def truncate(self, length: int) -> None: ...


class Width(NamedTuple):
    """The storage of each engine's weights that is compared; None or empty: it has none."""

    ours: tuple[str, ...]
    llama_cpp: str | None = None
    openvino: str | None = None
    transformers: str | None = None


WIDTHS = {
    32: Width(("fp32",), transformers="fp32"),
    16: Width(("bf16", "fp16"), "F16", transformers="bf16"),
    8: Width(("int8",), "Q8_0", "int8"),
    4: Width(("int4",), "Q4_0", "int4"),
}


class Paceline:
    """The native engine as a `Runner`."""

    def __init__(self, engine: NativeEngine) -> None:
        self._engine = engine
        self._sequence = engine.open()
        self.bytes = engine.weight_bytes

    def extend(self, tokens: Tokens, logits: bool) -> Floats | None:
        """Run `tokens` [n] and keep them; without logits none are computed."""
        if not logits:
            self._engine.extend(self._sequence, tokens)
            return None
        rows = self._engine.forward([(self._sequence, TokenTree.chain(tokens))])
        self._engine.commit(self._sequence, np.arange(len(tokens), dtype=np.int32))
        return rows

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        self._engine.truncate(self._sequence, length)


class Source(Protocol):
    """A model: its shape, and its weights, the same at each call when read in their order."""

    config: ModelConfig

    def weights(self) -> Mapping[str, Floats]: ...


class Opened(NamedTuple):
    """An engine of the comparison.

    Attributes:
        name: with the storage of its weights.
        kernels: the instruction set, or where it comes from.
        runner: what runs.
        ours: not a peer.
    """

    name: str
    kernels: str
    runner: Runner
    ours: bool


def chosen(names: list[str] | None, widths: list[int] | None) -> dict[str, str]:
    """Peers that take part -> package and version; by default all but the wheel.

    Raises:
        SystemExit: one that is named is missing, or has no such width.
    """
    for name in names or ():
        for bits in widths or ():
            if storage(name, bits) is None:
                raise SystemExit(f"{name} is not compared in {bits} bits; see WIDTHS in runners.py")
    found = {name: PEERS[name]() for name in names or PEERS if names or name != WHEEL}
    if names and (missing := [name for name, build in found.items() if build is None]):
        raise SystemExit(f"not installed: {', '.join(missing)}; see benchmarks/README.md")
    return {name: build for name, build in found.items() if build}


def storage(peer: str, bits: int) -> str | None:
    """How a peer stores the weights in a width; None where it is not compared in it."""
    width = WIDTHS[bits]
    llama = dict.fromkeys(("llama.cpp", WHEEL), width.llama_cpp)
    return (llama | {"openvino": width.openvino, "transformers": width.transformers})[peer]


@contextmanager
def llama_cpp(of: Source, name: str, kind: str, threads: int) -> Iterator[Opened]:
    """llama.cpp on a GGUF file of the weights, which lives as long as it does."""
    library = Library(WHEEL if name == WHEEL else None)
    context = min(of.config.context, 1024)
    with TemporaryDirectory(prefix="paceline-") as folder:
        path = Path(folder) / f"{kind}.gguf"
        gguf_file.write(path, of.config, of.weights(), kind)
        engine = LlamaCpp(library, path, context, threads)
        try:
            yield Opened(f"{name} {kind}", library.isa, engine, False)
        finally:
            engine.close()


@contextmanager
def opened(
    of: Source,
    bits: int,
    peers: Mapping[str, str],
    isas: list[str] | None,
    threads: int,
    ours: bool = True,
) -> Iterator[list[Opened]]:
    """Yield the engines of one width: the peers, then ours."""
    config = of.config
    with ExitStack() as stack:
        found: list[Opened] = []
        for peer in peers:
            kind = storage(peer, bits)
            if kind is None:
                continue
            if peer in GGUF:
                found.append(stack.enter_context(llama_cpp(of, peer, kind, threads)))
                continue
            name, engine = {
                "openvino": ("OpenVINO", openvino_llama.OpenVino),
                "transformers": ("transformers", transformers_llama.Transformers),
            }[peer]
            runner = engine(config, of.weights(), threads, kind)
            found.append(Opened(f"{name} {kind}", "its own choice", runner, False))
        theirs = [each.kernels for each in found]
        for kind in WIDTHS[bits].ours if ours else ():
            for isa in isas or _isas(theirs):
                engine = NativeEngine(config, of.weights(), threads, kind, isa)
                found.append(Opened(f"Paceline {kind}", engine.isa, Paceline(engine), True))
        yield found


@contextmanager
def opened_file(
    of: Source,
    path: Path,
    formats: list[str],
    peers: Mapping[str, str],
    threads: int,
    context: int = 1024,
) -> Iterator[list[Opened]]:
    """Yield the engines that run one GGUF file: llama.cpp on its bits, then ours in `formats`.

    `auto` keeps the file's bits; other formats round the dequantised weights again.
    """
    with ExitStack() as stack:
        found: list[Opened] = []
        for peer in peers:
            if peer in GGUF:
                library = Library(WHEEL if peer == WHEEL else None)
                engine = LlamaCpp(library, path, min(of.config.context, context), threads)
                stack.callback(engine.close)
                found.append(Opened(peer, library.isa, engine, False))
        for kind in formats:
            ours = NativeEngine(of.config, of.weights(), threads, kind)
            found.append(Opened(f"Paceline {ours.format}", ours.isa, Paceline(ours), True))
        yield found


def _isas(theirs: list[str]) -> list[str]:
    """Our fastest kernels, and those of a peer's instruction set."""
    ours = _native.isas()
    return list(dict.fromkeys([ours[0], *(isa for isa in theirs if isa in ours)]))
