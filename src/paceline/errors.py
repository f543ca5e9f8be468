"""User-facing errors: one sentence with what was found, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PacelineError(Exception):
    """An error that the user can fix, in one sentence. The CLI prints it and exits with 2."""


class ModelError(PacelineError):
    """A checkpoint that cannot be used: missing, truncated, inconsistent, unsupported."""


class RequestError(PacelineError):
    """A request that cannot be served: empty, too long, out of range."""


class TooLongError(RequestError):
    """A text of more tokens than the model sees, or the server takes."""


class MemoryFullError(RequestError):
    """The KV cache needs more pages than its limit leaves. Nothing was changed."""


class MethodError(PacelineError):
    """An unknown method or setting, or a combination that is not supported."""


class CombinationError(MethodError, RequestError):
    """Two things that do not go together; `compatibility.py` has the table."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return a sentence for a name that does not exist, with the nearest ones that do."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}."
    return f"unknown {kind} {name!r}; {hint}"


def one_line(error: object) -> str:
    """Return what another library says, without line breaks, for one of our sentences."""
    return " ".join(str(error).split())
