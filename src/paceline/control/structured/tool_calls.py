"""Finds the tool calls in what a model wrote, in the syntax of any of the open model families.

- Hermes, Qwen 2.5 and 3, SmolLM, Granite 4:
  `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`
- Qwen3-Coder: `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`
- Llama 3: `{"name": ..., "parameters": {...}}`, or `<function=NAME>{...}</function>`
- Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]NAME[ARGS]{...}`
- Granite 3, Phi-4: `<|tool_call|>[{...}]`, `functools[{...}]`
- Gemma, Llama 4: `[NAME(KEY=VALUE)]`, or calls in a fence of `tool_code`
- DeepSeek: a name and JSON between `<｜tool▁call▁begin｜>` and
  `<｜tool▁call▁end｜>`

Others write JSON alone, or in a fence at the end. A call counts only where the model makes it: not
inside reasoning, code or quotation marks of code, and not in the middle of a sentence.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

_OPENINGS = (
    *("<tool_call>", "<|tool_call|>", "[TOOL_CALLS]", "<function=", "functools["),
    *("<|python_tag|>", "<\uff5ctool\u2581calls\u2581begin\uff5c>"),
    "<\uff5ctool\u2581call\u2581begin\uff5c>",
)
_THINK = "<think>", "</think>"
# Ends of calls, each optional: what was written without one counts as well.
_CUT_END = "|".join("</tool_call"[:size] for size in range(11, 0, -1))  # where a text was cut
_ENDS = re.compile(
    r"\s*(?:</tool_call>|<\|/?tool_call\|>|</function>|"
    rf"<\uff5ctool\u2581calls?\u2581end\uff5c>|(?:{_CUT_END})\Z)"
)
_SPACE = re.compile(r"[\s;,]*")
_MARK = re.compile(
    "|".join(map(re.escape, (*_OPENINGS, _THINK[0], "```", "`"))) + r"|(?m:^[ \t]*[{\[])"
)
_FENCE = re.compile(r"```[ \t]*([\w-]*)[ \t]*\n?(.*?)```", re.DOTALL)
_OPEN_FENCE = re.compile(r"```[ \t]*([\w-]*)(\s)?")
_FENCES = ("", "json", "tool_code", "tool_call", "tool_calls")
_FUNCTION = re.compile(r"<function=([^>\n]{1,64})>(.*?)(?:</function>|$)", re.DOTALL)
_PARAMETER = re.compile(
    r"<parameter=([^>\n]{1,200})>\n?(.*?)(?:\n?</parameter>|(?=<parameter=)|$)", re.DOTALL
)
_MISTRAL = re.compile(r"([A-Za-z0-9_.-]{1,64})(?:\[CALL_ID\][^\[{]{0,64})?(?:\[ARGS\])?\s*(?=\{)")
_DEEPSEEK = re.compile(
    r"(?:function)?<\uff5ctool\u2581sep\uff5c>([A-Za-z0-9_.-]{1,64})\s*(?:```json)?\s*(?=\{)|"
    r"([A-Za-z0-9_.-]{1,64})<\uff5ctool\u2581sep\uff5c>\s*(?=\{)"
)
_AFTER_JSON = re.compile(r"\s*```")
_PYTHON = re.compile(r"\[?\s*([A-Za-z_][A-Za-z0-9_.]{0,63})\(")
_CUT_PYTHON = re.compile(r"\[?\s*([A-Za-z_][A-Za-z0-9_.]{0,63})?\Z")
_LONGEST_PYTHON = 20_000  # characters
_KEYS = frozenset({"name", "arguments", "parameters", "type", "id", "index"})

_decoder = json.JSONDecoder()


class ToolCall(NamedTuple):
    """A call that the model asks for."""

    name: str
    arguments: dict[str, Any]


class ToolText(NamedTuple):
    """A text and the calls in it.

    Attributes:
        content: the text without the calls.
        calls: in their order.
    """

    content: str
    calls: list[ToolCall]


@dataclass(frozen=True)
class _Span:
    """A part of a text that makes calls."""

    start: int
    end: int
    calls: list[ToolCall]


def read_calls(text: str, functions: Mapping[str, Any]) -> ToolText:
    """Return the calls of known functions in a finished text, and what is beside them.

    Args:
        text: any text; what is no call stays in the content.
        functions: name -> JSON schema of the arguments.
    """
    content, calls, at = [], [], 0
    for span in _Reader(text, functions).spans():
        content.append(text[at : span.start].rstrip())
        calls += span.calls
        at = span.end
    rest = text[at:]
    content.append(rest if rest.strip() or not calls else "")
    return ToolText("".join(content), calls)


def certain_content(text: str, functions: Mapping[str, Any]) -> int:
    """Return how many characters of an unfinished text are content, whatever may follow."""
    end = _Reader(text, functions).undecided()
    return len(text[:end].rstrip())


class _Reader:
    """Goes through a text once, from mark to mark."""

    def __init__(self, text: str, functions: Mapping[str, Any]) -> None:
        self._text = text
        self._functions = functions

    def spans(self) -> Iterator[_Span]:
        """Yield the parts of a finished text that make calls."""
        at = 0
        while match := _MARK.search(self._text, at):
            found = self._at(match)
            if isinstance(found, _Span):
                yield found
                at = found.end
            else:
                at = max(found, match.start() + 1)

    def undecided(self) -> int:
        """Return where the first part begins that makes a call, or may become one."""
        text, at = self._text, 0
        while match := _MARK.search(text, at):
            found = self._at(match)
            if isinstance(found, _Span) or self._may_grow(match):
                return match.start()
            at = max(found, match.start() + 1)
        starts = (*_OPENINGS, _THINK[0], "```")
        for size in range(min(len(text), max(map(len, starts)) - 1), 0, -1):
            if any(mark.startswith(text[-size:]) for mark in starts):
                return len(text) - size
        return len(text)

    def _at(self, match: re.Match[str]) -> _Span | int:
        """Return the calls that a mark begins, or where to go on."""
        text, mark, start = self._text, match[0], match.start()
        if mark == _THINK[0]:
            end = text.find(_THINK[1], start)
            return len(text) if end < 0 else end + len(_THINK[1])
        if mark == "```":
            return self._fence(start)
        if mark == "`":
            line = text.find("\n", start) % (len(text) + 1)
            end = text.find("`", start + 1, line)
            return start + 1 if end < 0 else end + 1
        if mark in _OPENINGS:
            return self._tagged(start)
        return self._alone(match.end() - 1)

    def _may_grow(self, match: re.Match[str]) -> bool:
        """Return whether more text could make a call of what begins here."""
        text, mark, start = self._text, match[0], match.start()
        if mark == "```":
            if not self._begins_line(start):
                return False
            closed = _FENCE.match(text, start)
            if closed is None:
                return self._fence_may_grow(start)
            # A fence of calls counts where it ends the text.
            return bool(self._values(closed[2])) and not text[closed.end() :].strip()
        if mark in (_THINK[0], "`"):
            return False
        if mark in _OPENINGS:
            line = text.find("\n", start)
            return not self._cited(start) or line < 0
        begin = match.end() - 1
        values, end = self._json_run(begin)
        if not values:
            return self._is_cut(begin) or self._python_may_grow(begin)
        if not all(self._calls(value) for value in values):
            return False
        return not text[end:].strip() or self._is_cut(end)

    def _fence_may_grow(self, start: int) -> bool:
        """Return whether an open fence holds a call so far."""
        opening = _OPEN_FENCE.match(self._text, start)
        if opening is None:
            return False
        info, body = opening[1], opening[2]
        if body is None:
            return any(name.startswith(info) for name in _FENCES)
        begin = _space(self._text, opening.end())
        if info not in _FENCES:
            return False
        rest = self._text[begin : begin + 1]
        return not rest or rest in "{[" or self._python_may_grow(begin)

    def _python_may_grow(self, start: int) -> bool:
        """Return whether calls written as Python begin here, or may."""
        match = _PYTHON.match(self._text, start)
        if match:
            return match[1] == "print" or match[1] in self._functions
        match = _CUT_PYTHON.match(self._text, start)
        begun = (match[1] or "") if match else None
        return begun is not None and any(
            name.startswith(begun) for name in ("print", *self._functions)
        )

    def _is_cut(self, start: int) -> bool:
        """Return whether JSON that begins here is incomplete rather than wrong."""
        try:
            _decoder.raw_decode(self._text, start)
        except ValueError as error:
            at = getattr(error, "pos", 0)
            unended = "Unterminated" in str(error) or "Invalid control" in str(error)
            return unended or at >= len(self._text.rstrip()) - 5
        except RecursionError:
            return False
        return False

    def _begins_line(self, start: int) -> bool:
        return not self._text[self._text.rfind("\n", 0, start) + 1 : start].strip()

    def _cited(self, start: int, end: int | None = None) -> bool:
        """Return whether a call from `start` to `end` stands in the middle of a line."""
        before = self._text[self._text.rfind("\n", 0, start) + 1 : start]
        if not before.strip() or before.rstrip().endswith(_THINK[1]):
            return False
        if end is None:
            return False
        line = self._text.find("\n", end)
        after = self._text[end : line if line >= 0 else len(self._text)].strip()
        return bool(after) and not after.startswith(_OPENINGS)

    def _tagged(self, start: int) -> _Span | int:
        text = self._text
        mark = next(each for each in _OPENINGS if text.startswith(each, start))
        at = start + len(mark)
        if mark in ("<function=", "functools["):
            at = start if mark == "<function=" else at - 1
        calls: list[ToolCall] = []
        end = at
        while True:
            begin = _space(text, end)
            if mark.startswith("<\uff5c") and text.startswith(_OPENINGS[-1], begin):
                begin += len(_OPENINGS[-1])
            found = self._one(begin, mark)
            if found is None:
                break
            more, end = found
            calls += more
            while closing := _ENDS.match(text, end):
                end = closing.end()
            if mark in ("<tool_call>", "<function="):  # each call has an opening of its own
                break
        if not calls or self._cited(start, end):
            return at if not calls else end
        return _Span(start, end, calls)

    def _one(self, start: int, mark: str) -> tuple[list[ToolCall], int] | None:
        """Return the calls of one value after an opening, and where it ends."""
        text = self._text
        if function := _FUNCTION.match(text, start):
            call = self._function(function[1].strip(), function[2])
            return ([call], function.end()) if call else None
        named = _MISTRAL if mark == "[TOOL_CALLS]" else _DEEPSEEK
        if match := named.match(text, start):
            name = next(group for group in match.groups() if group)
            value, end = _json_at(text, match.end())
            call = self._call(name, value) if end else None
            if call is None:
                return None
            fence = _AFTER_JSON.match(text, end)
            return [call], fence.end() if fence and "```json" in match[0] else end
        value, end = _json_at(text, start)
        if end:
            calls = self._calls(value)
            return (calls, end) if calls else None
        return self._python(start)

    def _alone(self, start: int) -> _Span | int:
        """Return the calls of JSON or Python that stands alone from here to the end."""
        text = self._text
        values, end = self._json_run(start)
        if not values:
            python = self._python(start)
            if python and not text[python[1] :].strip():
                return _Span(start, len(text), python[0])
            return start + 1
        calls: list[ToolCall] = []
        for value in values:
            found = self._calls(value)
            if not found:
                return end
            calls += found
        return _Span(start, len(text), calls) if not text[end:].strip() else end

    def _json_run(self, start: int) -> tuple[list[object], int]:
        """Return the JSON values that follow each other from here, and where they end."""
        values: list[object] = []
        end = start
        while True:
            value, after = _json_at(self._text, _space(self._text, end))
            if not after or not isinstance(value, dict | list):
                return values, end
            values.append(value)
            end = after

    def _fence(self, start: int) -> _Span | int:
        match = _FENCE.match(self._text, start)
        if match is None:
            return len(self._text)
        ends = not self._text[match.end() :].strip()
        if ends and match[1] in _FENCES and self._begins_line(start):
            calls = self._values(match[2])
            if calls:
                return _Span(start, match.end(), calls)
        return match.end()

    def _values(self, text: str) -> list[ToolCall]:
        """Return the calls of a text that holds nothing else."""
        inner = _Reader(text.strip(), self._functions)
        found = inner._alone(0) if inner._text[:1] in ("{", "[") else inner._python(0)
        if isinstance(found, _Span):
            return found.calls
        if isinstance(found, tuple) and found[1] == len(inner._text):
            return found[0]
        return []

    def _calls(self, value: object) -> list[ToolCall]:
        """Return the calls that a JSON value describes; none if a part of it is no call."""
        calls: list[ToolCall] = []
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, dict):
                return []
            inner = each.get("function")
            if isinstance(inner, dict) and each.keys() <= {"type", "id", "index", "function"}:
                each = inner
            if not each.keys() <= _KEYS:
                return []
            call = self._call(each.get("name"), each.get("arguments", each.get("parameters")))
            if call is None:
                return []
            calls.append(call)
        return calls

    def _call(self, name: object, arguments: object) -> ToolCall | None:
        if not isinstance(name, str) or name not in self._functions:
            return None
        if isinstance(arguments, str):
            value, end = _json_at(arguments, _space(arguments, 0))
            arguments = value if end and not arguments[end:].strip() else arguments.strip() or None
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict) or not _is_strict(arguments):
            return None
        return ToolCall(name, arguments)

    def _function(self, name: str, body: str) -> ToolCall | None:
        """Return a call whose arguments are JSON, or one tag for each."""
        if name not in self._functions:
            return None
        if "<parameter=" not in body:
            return self._call(name, body)
        schema = self._functions[name]
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        arguments: dict[str, Any] = {}
        for match in _PARAMETER.finditer(body):
            key, text = match[1].strip(), match[2]
            kind = properties.get(key) if isinstance(properties, Mapping) else None
            typed = kind.get("type") if isinstance(kind, Mapping) else None
            value, end = _json_at(text, 0)
            arguments[key] = value if end == len(text) > 0 and typed != "string" else text
        return self._call(name, arguments)

    def _python(self, start: int) -> tuple[list[ToolCall], int] | None:
        """Return calls written as Python, with constants as arguments; nothing is executed."""
        text = self._text
        if not _PYTHON.match(text, start) or len(text) - start > _LONGEST_PYTHON:
            return None
        listed = text[start] == "["
        end = text.rfind("]" if listed else ")", start) + 1
        try:
            body = ast.parse(text[start:end], mode="exec").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
        calls: list[ToolCall] = []
        for statement in body:
            value = statement.value if isinstance(statement, ast.Expr) else None
            parts = value.elts if isinstance(value, ast.List) else [value]
            for part in parts:
                call = self._python_call(part)
                if call is None:
                    return None
                calls.append(call)
        return (calls, end) if calls else None

    def _python_call(self, node: ast.AST | None) -> ToolCall | None:
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
        ):
            node = node.args[0] if len(node.args) == 1 and not node.keywords else None
        if not isinstance(node, ast.Call) or node.args:
            return None
        try:
            name = ast.unparse(node.func)
            arguments = {each.arg: ast.literal_eval(each.value) for each in node.keywords}
        except (ValueError, TypeError, RecursionError, MemoryError):
            return None
        if any(not isinstance(key, str) for key in arguments):
            return None
        return self._call(name, arguments)


def _space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    return match.end() if match else start


def _json_at(text: str, start: int) -> tuple[object, int]:
    """Return the JSON value that begins here and its end; 0 where there is none."""
    try:
        return _decoder.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, 0


def _is_strict(value: object) -> bool:
    """Return whether a value can be written as JSON that every reader takes."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError):
        return False
    return True
