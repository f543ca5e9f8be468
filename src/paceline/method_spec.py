"""The one grammar in which users name things with settings: `NAME:key=value,key=value`.

Several stand with `+` between them. A value that contains a comma, `+` or `;`, or that begins with
a quotation mark, is written as a JSON string: `cfg:negative="sad, slow",scale=1.5`. Drafters,
controls, guides, strategies, watermarks, cache policies, weight formats and ensembles are named
this way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from paceline.errors import MethodError

_DECODER = json.JSONDecoder()
Keys = Callable[[str], Sequence[str]]

_KEY = re.compile(r"[A-Za-z_][\w.-]*")
_COMMA = re.compile(",")
_NESTED = ("members",)  # settings that are lists of specifications; an unquoted `+` is theirs


@dataclass(frozen=True)
class MethodSpec:
    """A name with settings, both as text.

    Attributes:
        name: of the method, the format or the model.
        settings: values by key, in the order in which they were given.
    """

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        items = ",".join(f"{key}={_quoted(value)}" for key, value in self.settings.items())
        plain = self.name == self.name.strip() and not set(self.name) & set(':,+;"')
        name = self.name if plain else json.dumps(self.name, ensure_ascii=False)
        return f"{name}:{items}" if items else name


def no_keys(name: str) -> Sequence[str]:
    """Return the keys of values that are given without one, for methods whose values need one."""
    return ()


def parse_spec(text: str, keys: Keys = no_keys) -> MethodSpec:
    """Parse `NAME[:key=value,...]`; a `+` has no meaning outside of lists.

    Args:
        text: the specification.
        keys: returns, for a name, the keys of leading values that are given without one, in order;
            may raise for a name that it does not know.

    Raises:
        MethodError: a setting has no value, or is given twice.
    """
    return _Scanner(text, keys).spec()


def parse_specs(
    text: str,
    names: Collection[str] | None = None,
    keys: Keys = no_keys,
) -> list[MethodSpec]:
    """Parse specifications with `+` between them.

    Args:
        text: one or more specifications; empty ones are skipped.
        names: known names. In an unquoted value only a `+` before one of them begins the next
            specification, so that a path or a text may contain others; if None, every `+` does.
        keys: as for `parse_spec`.

    Raises:
        MethodError: as `parse_spec`.
    """
    scanner = _Scanner(text, keys, _following(names))
    specs = []
    while scanner.at < len(text):
        specs.append(scanner.spec())
        scanner.at += 1  # the `+`
    return [spec for spec in specs if spec.name or spec.settings]


def split_list(text: str, names: Collection[str]) -> list[MethodSpec]:
    """Parse specifications with `+`, `;` or `,` between them; the last two are an earlier spelling.

    A comma before `KEY=VALUE` continues the settings of the specification before it.

    Raises:
        MethodError: as `parse_spec`.
    """
    scanner = _Scanner(text, no_keys, rf"{_following(names)}|;|,(?!\s*{_KEY.pattern}\s*=)")
    specs = []
    while scanner.at < len(text):
        specs.append(scanner.spec())
        scanner.at += 1  # the separator
    return [spec for spec in specs if spec.name or spec.settings]


def split_quoted(text: str, separator: str) -> list[str]:
    """Split a list at a separator, except within JSON strings; parts are stripped.

    A string begins at a quotation mark at the beginning of a value: at the start of the text, or
    after one of `:=,;+`.
    """
    parts, start, at, begins = [], 0, 0, True
    while at < len(text):
        character, end = text[at], at + 1
        if character == separator:
            parts.append(text[start:at].strip())
            start = end
        elif character == '"' and begins:
            with suppress(json.JSONDecodeError):  # then the mark stands for itself
                end = _DECODER.raw_decode(text, at)[1]
        begins = character in ":=,;+" or (begins and character.isspace())
        at = end
    return [*parts, text[start:].strip()]


def unquoted(part: str) -> str:
    """Return the text of a part that is a JSON string, and other parts as they are."""
    try:
        value = json.loads(part) if part.startswith('"') else part
    except json.JSONDecodeError:
        return part
    return str(value)


def members(name: str, text: str, separator: str) -> list[str]:
    """Return the members of a list as `split_quoted` does; an empty text has none.

    Raises:
        MethodError: a member is empty.
    """
    parts = split_quoted(text, separator) if text.strip() else []
    if "" in parts:
        raise MethodError(f"{name} has an empty member in {text!r:.80}; leave the {separator} out")
    return parts


def join_specs(specs: Iterable[MethodSpec]) -> str:
    """Return the text that `parse_specs` reads."""
    return "+".join(map(str, specs))


def _quoted(value: str) -> str:
    if value.startswith('"') or set(value) & set(",+;"):
        return json.dumps(value, ensure_ascii=False)
    return value


def _following(names: Collection[str] | None) -> str:
    """Return the pattern of a `+` that begins the next specification after a value."""
    if names is None:
        return r"|\+"
    return rf"|\+(?=(?:{'|'.join(map(re.escape, names))})(?:[:+]|$))"


class _Scanner:
    """Reads specifications from left to right.

    Args:
        text: what is read.
        keys: as for `parse_spec`.
        following: pattern of the `+` after a value that separates specifications; empty for none.
    """

    def __init__(self, text: str, keys: Keys, following: str = "") -> None:
        self.text, self.keys, self.at = text, keys, 0
        self._name_end = re.compile(
            r"[:+,;]" if ";" in following else r"[:+]" if following else ":"
        )
        self._value_end = re.compile("," + following)
        self._key_end = re.compile("[=,]" + following)
        self._separator = re.compile(following.removeprefix("|") or "$")

    def spec(self) -> MethodSpec:
        """Read one specification and stop at the `+` behind it, or at the end."""
        quoted = self._here() == '"'
        name = self._value(self._name_end)
        name = name if quoted else name.strip()
        keys = list(self.keys(name)) if name else []
        settings: dict[str, str] = {}
        if self._here() == ":":
            self.at += 1
            self._setting(name, settings, keys)
            while self._here() == "," and not self._separator.match(self.text, self.at):
                self.at += 1
                self._setting(name, settings, keys)
        return MethodSpec(name, settings)

    def _setting(self, name: str, settings: dict[str, str], positional: list[str]) -> None:
        """Read `key=value`, or a value for the next of `positional`."""
        start, end = self.at, self._key_end.search(self.text, self.at)
        quoted = self._here() == '"'
        if end and end[0] == "=" and not quoted:
            key, self.at = self.text[start : end.start()].strip(), end.end()
            if not _KEY.fullmatch(key):
                raise MethodError(f"{name}: {key!r} is no name of a setting; write key=VALUE")
            positional.clear()  # values without keys come first
            value = self._value(self._value_end, _COMMA if key in _NESTED else None)
        else:
            value = self._value(self._value_end)
            if not value.strip() and not quoted:
                return
            if not positional and _KEY.fullmatch(value):
                raise MethodError(f"{name}:{value} has no value; write {value}=VALUE")
            if not positional:
                raise MethodError(f"{name}: the value {value!r} has no key; write KEY={value}")
            key = positional.pop(0)
        if key in settings:
            raise MethodError(f"{name}:{key} is given twice; give it once")
        settings[key] = value

    def _value(self, end: re.Pattern[str], plain_end: re.Pattern[str] | None = None) -> str:
        """Read a JSON string up to `end`, or plain text up to `plain_end`, by default the same."""
        start = self.at
        if self.text.startswith('"', start):
            try:
                value, stop = _DECODER.raw_decode(self.text, start)
            except json.JSONDecodeError:
                stop = -1
            if stop == len(self.text) or (stop > 0 and end.match(self.text, stop)):
                self.at = stop
                return str(value)
        match = (plain_end or end).search(self.text, start)
        self.at = match.start() if match else len(self.text)
        value = self.text[start : self.at]
        if value.startswith('"') and value.count('"') % 2:
            raise MethodError(f"{value} begins with a quotation mark that nothing closes; add it")
        return value

    def _here(self) -> str:
        return self.text[self.at : self.at + 1]
