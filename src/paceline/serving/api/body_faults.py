"""Tells where a body is wrong, and why, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SHOULD_BE = "Input should be "  # pydantic's


def printable(text: str) -> str:
    """Return the text with lone surrogates escaped, so that it can be written as UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def fault_of(faults: Sequence[Any], body: Any) -> tuple[str, str]:
    """Return where in a body a fault is, and what it is.

    Of the alternatives of a union, the one that fits furthest into the body counts; a wrong type
    explains more than what that type would need.

    Args:
        faults: pydantic's, whose locations begin with `body`.
        body: what was read.
    """
    paths = [_path(fault, body) for fault in faults]
    deepest = max(paths, key=lambda path: (len(path), path[-1:] == ("type",)))
    faults = [fault for fault, path in zip(faults, paths, strict=True) if path == deepest]
    kind, reason, context = faults[0]["type"], faults[0]["msg"], faults[0].get("ctx", {})
    if kind == "json_invalid":
        return "the body", f"is not JSON: {context.get('error', reason)}"
    if kind == "extra_forbidden":
        reason = "is not a parameter of this server"
    elif kind == "union_tag_invalid" and deepest[-1:] == ("type",):
        reason = _SHOULD_BE + context["expected_tags"].replace("', '", "' or '")
    elif kind == "union_tag_invalid":
        reason = f"is of the type {context['tag']!r:.80}, expected {context['expected_tags']}"
    elif kind == "value_error" and "error" in context:
        reason = str(context["error"])
    elif all(fault["msg"].startswith(_SHOULD_BE) for fault in faults):
        reasons = dict.fromkeys(fault["msg"].removeprefix(_SHOULD_BE) for fault in faults)
        reason = _SHOULD_BE + " or ".join(reasons)
    return ".".join(printable(str(part)) for part in deepest), reason


def _path(fault: Mapping[str, Any], body: Any) -> tuple[str | int, ...]:
    """Return the keys of a fault in the body, without pydantic's names of alternatives."""
    path: list[str | int] = []
    loc = fault["loc"][1:]
    for part in loc:
        if (isinstance(body, dict) and part in body) or (
            isinstance(body, list) and isinstance(part, int) and part < len(body)
        ):
            path.append(part)
            body = body[part]
    tagged = fault.get("ctx", {}).get("discriminator") == "'type'"
    if tagged and isinstance(body, dict) and "type" in body:
        return (*path, "type")
    return (*path, loc[-1]) if fault["type"] == "missing" and loc else tuple(path)
