"""Monitor-guided decoding of Python: after a dot only attributes that exist."""

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

_LARGEST = 1 << 22  # characters that are analysed, at most
_KNOWN = 256  # dots whose attribute names are cached
_NAME = rb"[A-Za-z0-9_\x80-\xff]*"
_AFTER_DOT = re.compile(rb"[A-Za-z0-9_\x80-\xff)\]}'\"]\.(" + _NAME + rb")\Z")
_BEGINS = re.compile(_NAME)
_PART = bytes(byte for byte in range(256) if _BEGINS.fullmatch(bytes([byte])))


@controls.register("monitor", Exactness.EXACT)
@dataclass(frozen=True)
class Monitor(ControlMethod):
    """Write Python in which every attribute exists, as far as static analysis can tell.

    After the dot of `value.`, only tokens are allowed that begin or continue the name of one of its
    attributes; other tokens may follow a complete name. The names come from jedi
    (`paceline[monitor]`), which is called once per dot, and reads prompt and output without running
    them. Nothing is forbidden where jedi fails, knows no attributes, or knows none that the tokens
    can spell, nor in strings, comments and numbers. Attributes created at run time are unknown.

    Attributes:
        project: folder to import modules from, besides the installed ones. Default `.`, the
            current directory.
        before: path of a file whose text precedes the prompt, e.g. the file that is continued.
            Default none.
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
    missing = {441: "languages besides Python, and monitors other than of attribute names"}

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Return the control for an output after the prompt.

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
    """Asks jedi for the attributes after a text.

    Args:
        project: folder to import modules from.
        before: text that precedes every other.
        path: file that the text belongs to, for relative imports; may be empty.
    """

    def __init__(self, project: str, before: str = "", path: str = "") -> None:
        self._project, self._before, self._path = project, before, path

    def __call__(self, code: str) -> list[str]:
        """Return the attributes of the value before the dot that ends `code`; empty if unknown."""
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
            names = script.complete(*place)
            return [each.name for each in names if each.type != "keyword"]
        except Exception:  # a failed analysis forbids nothing
            return []


def _is_access(code: str, place: tuple[int, int]) -> bool:
    """Return whether the dot at `place` is an attribute access, not in a number or string."""
    import parso

    parse: Any = parso.parse
    leaf = parse(code).get_leaf_for_position(place)
    if leaf is None or leaf.type != "operator" or leaf.value != ".":
        return False
    while leaf is not None and leaf.start_pos[0] == place[0]:
        if leaf.type == "error_leaf" and leaf.value[-1:] in ("'", '"'):
            return False  # an unterminated string
        leaf = leaf.get_previous_leaf()
    return True


class _Name(NamedTuple):
    """After a dot: the possible attributes, and the part of a name that is written."""

    names: frozenset[bytes]
    part: bytes


class _Monitor:
    """Restricts names after dots. Pure; names are cached by the text before the dot."""

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
        name = self._after_dot(history)
        row = None if name is None else self._row(name)
        if row is None or not np.isfinite(logits[row]).any():
            return logits
        edited: Floats = np.where(row, logits, np.float32(-np.inf))
        return edited

    def allows(self, history: list[int], tree: TokenTree) -> NDArray[np.bool_]:
        """See `FiltersDrafts`. Only within a name: more analysis would cost more than it saves."""
        states = [self._after_dot(history)]
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

    def _after_dot(self, history: list[int]) -> _Name | None:
        """Return the state if a name is being written after a dot with known attributes."""
        if history[-1] in self._stops:
            return None
        tail = b""
        for token in reversed(history):
            tail = self._pieces[token] + tail
            if len(tail.rstrip(_PART)) > 1:
                break  # has the dot and what is before it, or has no dot
        match = _AFTER_DOT.search(tail)
        if match is None:
            return None
        part = match[1]
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
        """Return the tokens, bool [V], that continue a name or follow a complete one."""
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
    """Tokens by the part of a name that they begin with: only that, or with more after it."""

    inside: dict[bytes, list[int]]
    ending: dict[bytes, list[int]]


_by_vocabulary: WeakKeyDictionary[Vocabulary, _TokenIndex] = WeakKeyDictionary()


def _tokens(vocabulary: Vocabulary) -> _TokenIndex:
    if vocabulary not in _by_vocabulary:
        index = _TokenIndex({}, {})
        for token, piece in enumerate(vocabulary.pieces):
            begins = _BEGINS.match(piece)
            part = begins[0] if begins else b""
            if piece:
                by = index.inside if part == piece else index.ending
                by.setdefault(part, []).append(token)
        _by_vocabulary[vocabulary] = index
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
