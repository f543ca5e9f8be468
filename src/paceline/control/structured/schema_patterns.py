"""Patterns of a JSON schema: character classes that llguidance reads wrongly, sets of names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

_LAST = 0x10FFFF
_DIGITS = [(48, 57)]
_WORDS = [(48, 57), (65, 90), (95, 95), (97, 122)]
_BLANKS = [(9, 13), (32, 32)]
_NAMED = {"d": _DIGITS, "w": _WORDS, "s": _BLANKS}
_ESCAPED = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "b": 8, "0": 0}
_SHORT = {8: r"\x08", 9: r"\t", 10: r"\n", 12: r"\x0c", 13: r"\r"}  # JSON has an escape for them
_CODE = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|[xu]\{([0-9a-fA-F]{1,6})\}")

_Ranges = list[tuple[int, int]]


def safe_pattern(pattern: str) -> str:
    r"""Return a pattern whose character classes mean in JSON text what they say.

    llguidance lets an escaped quote or backslash through a class with control characters that
    excludes it, as `[^"]`. Such a class becomes an alternation of printable characters and of the
    control characters that JSON has a short escape for; others are never written.

    Raises:
        ValueError: such a class cannot be read.
    """
    parts, at = list[str](), 0
    while at < len(pattern):
        if not _writable(pattern, at):
            raise ValueError("a control character can only be written as \\u")
        if pattern[at] == "\\":
            parts.append(pattern[at : at + 2])
            at += 2
        elif pattern[at] == "[":
            ranges, end = _read_class(pattern, at)
            parts.append(_write_class(ranges, pattern[at:end]))
            at = end
        else:
            parts.append(pattern[at])
            at += 1
    return "".join(parts)


def _writable(pattern: str, at: int) -> bool:
    r"""Whether the character at a place, outside classes, can be written without `\u`."""
    code = _CODE.match(pattern, at + 1) if pattern[at] == "\\" else None
    character = int(code[1] or code[2] or code[3], 16) if code else ord(pattern[at])
    if pattern[at] == "\\" and pattern[at + 1 : at + 2] in ("v", "0", "a", "c"):
        return False
    return character >= 32 or character in _SHORT


def writable(value: Any) -> bool:
    r"""Whether the texts in a JSON value can be written without `\u`."""
    if isinstance(value, str):
        return all(ord(c) >= 32 or ord(c) in _SHORT for c in value)
    if isinstance(value, Mapping):
        return all(writable(key) and writable(each) for key, each in value.items())
    return not isinstance(value, list) or all(writable(each) for each in value)


def one_of(names: Iterable[str]) -> str:
    """Return an anchored pattern that exactly the given names match."""
    return f"^(?:{'|'.join(_literal(name) for name in names)})$"


def none_of(names: Iterable[str]) -> str:
    """Return an anchored pattern that every text but the given ones matches."""
    return f"^(?:{_other(sorted(set(names)))})$"


def _other(names: list[str]) -> str:
    """Return a pattern for all texts but `names`: branches where the first character differs."""
    first = sorted({name[0] for name in names if name})
    branches = [] if "" in names else [""]
    excluded = _complement(_merge([(ord(c), ord(c)) for c in first]))
    branches.append(f"{_write_class(excluded, None)}(?s:.*)")
    for c in first:
        branches.append(_literal(c) + f"(?:{_other([n[1:] for n in names if n and n[0] == c])})")
    return "|".join(branches)


def _literal(text: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else f"\\x{{{ord(c):x}}}" for c in text)


# ------------------------------------------------------------------------------------- classes


def _read_class(pattern: str, start: int) -> tuple[_Ranges, int]:
    """Return the characters of the class that starts at `start`, and the place behind it."""
    at = start + 1
    negated = pattern[at : at + 1] == "^"
    at += negated
    ranges, begin = _Ranges(), at
    while pattern[at : at + 1] != "]" or at == begin:
        low, at = _read_member(pattern, at)
        if isinstance(low, int) and pattern[at : at + 1] == "-" and pattern[at + 1 : at + 2] != "]":
            high, behind = _read_member(pattern, at + 1)
            if isinstance(high, int):
                if high < low:
                    raise ValueError(f"the range {pattern[at - 1 : behind]} is empty")
                ranges.append((low, high))
                at = behind
                continue
        ranges += [(low, low)] if isinstance(low, int) else low
    merged = _merge(ranges)
    return (_complement(merged) if negated else merged), at + 1


def _read_member(pattern: str, at: int) -> tuple[int | _Ranges, int]:
    r"""Return a character, or those of an escape such as `\d`, and the place behind it."""
    if at >= len(pattern):
        raise ValueError("a character class has no end")
    if pattern[at] != "\\":
        return ord(pattern[at]), at + 1
    letter = pattern[at + 1 : at + 2]
    code = _CODE.match(pattern, at + 1)
    if code:
        return int(code[1] or code[2] or code[3], 16), code.end()
    if letter.lower() in _NAMED:
        named = _NAMED[letter.lower()]
        return (_complement(named) if letter.isupper() else named), at + 2
    if letter in _ESCAPED:
        return _ESCAPED[letter], at + 2
    if not letter or letter.isalnum():
        raise ValueError(f"\\{letter} in a character class cannot be read")
    return ord(letter), at + 2


def _write_class(ranges: _Ranges, source: str | None) -> str:
    """Return a class in the form that llguidance reads rightly: `source` itself if it does."""
    quotes = sum(low <= ord(c) <= high for c in '"\\' for low, high in ranges)
    controls = any(low < 32 for low, _ in ranges)
    odd = source is not None and re.search(r"(?<!\\)(?:\[|&&|--|~~)", source[1:])
    if source is not None and not odd and (quotes == 2 or not controls):
        return source
    printable = _merge([(max(low, 32), high) for low, high in ranges if high >= 32])
    inner = "".join(f"\\x{{{low:x}}}-\\x{{{high:x}}}" for low, high in printable)
    short = [text for c, text in _SHORT.items() if any(low <= c <= high for low, high in ranges)]
    if not inner and not short:
        raise ValueError("a character class has no character that JSON text has without \\u")
    return f"(?:{'|'.join([*([f'[{inner}]'] if inner else []), *short])})"


def _merge(ranges: _Ranges) -> _Ranges:
    merged = _Ranges()
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _complement(ranges: _Ranges) -> _Ranges:
    edges = [(-1, -1), *ranges, (_LAST + 1, _LAST + 1)]
    return [(a[1] + 1, b[0] - 1) for a, b in pairwise(edges) if a[1] + 1 <= b[0] - 1]
