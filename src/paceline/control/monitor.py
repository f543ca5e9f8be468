"""Monitor-guided decoding of Python: behind a dot only attributes that exist."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from paceline.control.base import ControlMethod
from paceline.core import Control, Exactness, Floats, Request, TokenTree
from paceline.errors import MethodError, RequestError
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Source, controls

_LARGEST = 1 << 22  # characters that are analysed
_KNOWN = 256  # dots whose names are remembered
_NAME = rb"[A-Za-z0-9_\x80-\xff]*"
_AFTER_DOT = re.compile(rb"[A-Za-z0-9_\x80-\xff)\]}'\"]\.(" + _NAME + rb")\Z")
_BEGINS = re.compile(_NAME)
_PART = bytes(byte for byte in range(256) if _BEGINS.fullmatch(bytes([byte])))


@controls.register("monitor", Exactness.EXACT)
@dataclass(frozen=True)
class Monitor(ControlMethod):
    """Python code in which every attribute exists, as far as static analysis knows.

    Behind the dot of `value.` only tokens are allowed that begin or continue the name of one of its
    attributes, and other tokens only behind a whole name. What they are is asked once at each dot,
    of jedi (`paceline[monitor]`), which reads prompt and output and runs none of it. Where jedi
    knows nothing, fails, or knows no name that the tokens can write, nothing is forbidden; so it is
    in strings, comments and numbers. Attributes that come about at run time are unknown to it.

    Attributes:
        project: folder in which imported modules are looked for, besides those installed.
            Default `.`, where the program runs.
        before: a file whose text stands before the prompt, e.g. what it is to continue. Default
            none.
    """

    project: str = "."
    before: str = ""

    order = 37
    paths = ("project", "before")
    source = Source(
        authors="Agrawal et al.",
        title="Monitor-Guided Decoding of Code LMs",
        arxiv="2306.10763",
        section="section 3",
    )
    catalogue = (441,)

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """At the end of the prompt.

        Raises:
            MethodError: jedi is not installed, or the tokens have no text of their own.
            RequestError: the folder or the file cannot be read.
        """
        try:
            import jedi  # noqa: F401
        except ImportError:
            raise MethodError("monitor needs jedi; pip install 'paceline[monitor]'") from None
        if not Path(self.project).is_dir():
            raise RequestError(f"monitor.project is {self.project!r}, expected a folder")
        before = _read(Path(self.before)) if self.before else ""
        return _Monitor(Analysis(self.project, before, self.before), request, vocabulary)


class Analysis:
    """What jedi says of a text.

    Args:
        project: folder of modules.
        before: text that stands before every other.
        path: the file that the text is part of, for relative imports; may be empty.
    """

    def __init__(self, project: str, before: str = "", path: str = "") -> None:
        self._project, self._before, self._path = project, before, path

    def __call__(self, code: str) -> list[str]:
        """The attributes of what stands before the dot at the end of `code`; empty if unknown."""
        import jedi

        code = self._before + code
        if len(code) > _LARGEST:
            return []
        lines = code.split("\n")
        place = (len(lines), len(lines[-1]))
        try:
            if not _is_access(code, place):
                return []
            script = jedi.Script(
                code,
                path=self._path or None,
                project=jedi.Project(self._project),
                environment=jedi.InterpreterEnvironment(),
            )
            found = script.complete(*place)
            return [each.name for each in found if each.type != "keyword"]
        except Exception:  # of whatever kind: an analysis that fails is none
            return []


def _is_access(code: str, place: tuple[int, int]) -> bool:
    """Whether the dot that ends `code` at `place` is no part of a number, string or comment."""
    import parso

    parse: Any = parso.parse
    leaf = parse(code).get_leaf_for_position(place)
    if leaf is None or leaf.type != "operator" or leaf.value != ".":
        return False
    while leaf is not None and leaf.start_pos[0] == place[0]:
        if leaf.type == "error_leaf" and leaf.value[-1:] in ("'", '"'):
            return False  # a string that is not closed
        leaf = leaf.get_previous_leaf()
    return True


class _Name(NamedTuple):
    """Behind a dot: the attributes, and what is written of one."""

    names: frozenset[bytes]
    part: bytes


class _Monitor:
    """Pure: the names behind a dot are kept by the text before it."""

    def __init__(
        self, analysis: Callable[[str], list[str]], request: Request, vocabulary: Vocabulary
    ) -> None:
        self._analysis, self._stops = analysis, request.stop_tokens
        self._pieces, self._strips = vocabulary.pieces, vocabulary.strips
        self._tokens = _tokens(vocabulary)
        self._known: dict[bytes, frozenset[bytes]] = {}
        self._rows: dict[_Name, NDArray[np.bool_]] = {}

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """See `core.Control`."""
        name = self._behind_dot(history)
        row = None if name is None else self._row(name)
        if row is None or not np.isfinite(logits[row]).any():
            return logits
        edited: Floats = np.where(row, logits, np.float32(-np.inf))
        return edited

    def allows(self, history: list[int], tree: TokenTree) -> NDArray[np.bool_]:
        """See `Filtering`. Within a name; behind it the analysis would cost more than the nodes."""
        states = [self._behind_dot(history)]
        kept = np.ones(len(tree), bool)
        for node in range(1, len(tree)):
            parent, token = int(tree.parents[node]), int(tree.tokens[node])
            state, after = states[parent], None
            row = None if state is None else self._row(state)
            if state is not None and row is not None and row.any():
                kept[node] = row[token]
                if self._inside(token):
                    after = state._replace(part=state.part + self._pieces[token])
            kept[node] &= kept[parent]
            states.append(after)
        return kept

    def _inside(self, token: int) -> bool:
        piece = self._pieces[token]
        return bool(piece) and _BEGINS.fullmatch(piece) is not None

    def _behind_dot(self, history: list[int]) -> _Name | None:
        """Where a name is being written behind a dot whose attributes are known."""
        if history[-1] in self._stops:
            return None
        tail = b""
        for token in reversed(history):
            tail = self._pieces[token] + tail
            if len(tail.rstrip(_PART)) > 1:
                break  # the dot and what is before it, or no dot
        found = _AFTER_DOT.search(tail)
        if found is None:
            return None
        part = found[1]
        text = b"".join(self._pieces[token] for token in history)
        text = text[: len(text) - len(part)]
        if self._strips and text.startswith(b" "):
            text = text[1:]
        if text not in self._known:
            if len(self._known) >= _KNOWN:
                del self._known[next(iter(self._known))]
            names = self._analysis(text.decode(errors="replace"))
            self._known[text] = frozenset(name.encode() for name in names)
        return _Name(self._known[text], part) if self._known[text] else None

    def _row(self, name: _Name) -> NDArray[np.bool_]:
        """Tokens [V] with which an attribute's name goes on, or behind which it is whole."""
        if name not in self._rows:
            row = np.zeros(len(self._pieces), bool)
            rests = {n[len(name.part) :] for n in name.names if n.startswith(name.part)}
            for rest in rests:
                row[self._tokens.ending.get(rest, [])] = True
                for size in range(1, len(rest) + 1):
                    row[self._tokens.inside.get(rest[:size], [])] = True
            row[list(self._stops)] = b"" in rests
            if len(self._rows) >= _KNOWN:
                del self._rows[next(iter(self._rows))]
            self._rows[name] = row
        return self._rows[name]


class _TokenIndex(NamedTuple):
    """Tokens by the part of a name that they begin with: nothing but that, or something more."""

    inside: dict[bytes, list[int]]
    ending: dict[bytes, list[int]]


_by_vocabulary: WeakKeyDictionary[Vocabulary, _TokenIndex] = WeakKeyDictionary()


def _tokens(vocabulary: Vocabulary) -> _TokenIndex:
    if vocabulary not in _by_vocabulary:
        found = _TokenIndex({}, {})
        for token, piece in enumerate(vocabulary.pieces):
            begins = _BEGINS.match(piece)
            part = begins[0] if begins else b""
            if piece:
                by = found.inside if part == piece else found.ending
                by.setdefault(part, []).append(token)
        _by_vocabulary[vocabulary] = found
    return _by_vocabulary[vocabulary]


def _read(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise RequestError(f"monitor.before is {str(path)!r}, expected a file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RequestError(f"cannot read monitor.before, {path}: {error.strerror}") from None
