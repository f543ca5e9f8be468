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

from paceline.control.structured.python_names import OddNames

OPENINGS = (
    *("<tool_call>", "<|tool_call|>", "[TOOL_CALLS]", "<function=", "functools["),
    *("<|python_tag|>", "<\uff5ctool\u2581calls\u2581begin\uff5c>"),
    "<\uff5ctool\u2581call\u2581begin\uff5c>",
)
THINK = "<think>", "</think>"
# Ends of calls, each optional: what was written without one counts as well.
_CUT_END = "|".join("</tool_call"[:size] for size in range(11, 0, -1))  # where a text was cut
_ENDS = re.compile(
    r"\s*(?:</tool_call>|<\|/?tool_call\|>|</function>|"
    rf"<\uff5ctool\u2581calls?\u2581end\uff5c>|(?:{_CUT_END})\Z)"
)
_SPACE = re.compile(r"[\s;,]*")
MARK = re.compile(
    "|".join(map(re.escape, (*OPENINGS, THINK[0], "```", "`"))) + r"|(?m:^[ \t]*[{\[])"
)
_FENCE = re.compile(r"```[ \t]*([\w-]*)[ \t]*\n?")
FENCES = ("", "json", "tool_code", "tool_call", "tool_calls")
_FUNCTION = re.compile(r"<function=([^>\n]{1,64})>")
_FUNCTION_END = "</function>"
_PARAMETER = re.compile(
    r"<parameter=([^>\n]{1,200})>\n?(.*?)(?:\n?</parameter>|(?=<parameter=)|$)", re.DOTALL
)
_MISTRAL = re.compile(r"([A-Za-z0-9_.-]{1,64})(?:\[CALL_ID\][^\[{]{0,64})?(?:\[ARGS\])?\s*(?=\{)")
_DEEPSEEK = re.compile(
    r"(?:function)?<\uff5ctool\u2581sep\uff5c>([A-Za-z0-9_.-]{1,64})\s*(?:```json)?\s*(?=\{)|"
    r"([A-Za-z0-9_.-]{1,64})<\uff5ctool\u2581sep\uff5c>\s*(?=\{)"
)
_AFTER_JSON = re.compile(r"\s*```")
PYTHON = re.compile(r"\[?\s*([A-Za-z0-9_.-]{1,64})\(")
_LONGEST_PYTHON = 20_000  # characters
# Characters that may be read in vain, besides so many for each of the text: what models write must
# not keep a reader busy. Python is read more slowly than JSON, and deep nesting is given up late.
_VAIN, _VAIN_EACH = 100_000, 20
_PYTHON_COST, _DEEP_COST = 20, 20_000
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
class Span:
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
    for span in CallReader(text, functions).spans():
        content.append(text[at : span.start].rstrip())
        calls += span.calls
        at = span.end
    rest = text[at:]
    content.append(rest if rest.strip() or not calls else "")
    return ToolText("".join(content), calls)


class Fence(NamedTuple):
    """A fence of code, whose body lies between `start` and `close`; None while it is open."""

    info: str
    start: int
    close: int | None
    end: int


class CallReader:
    """Goes through a text once, from mark to mark.

    Args:
        text: any text.
        functions: name -> JSON schema of the arguments.

    Attributes:
        last: where white space at the end begins.
        left: characters that may still be read in vain; below 0 nothing more is read as a call.
    """

    def __init__(self, text: str, functions: Mapping[str, Any]) -> None:
        self.text = text
        self.functions = functions
        self.last = len(text.rstrip())
        self.left = _VAIN + _VAIN_EACH * len(text)

    def spans(self) -> Iterator[Span]:
        """Yield the parts of a finished text that make calls."""
        at = 0
        while match := MARK.search(self.text, at):
            found = self.at(match)
            if isinstance(found, Span):
                yield found
                at = found.end
            else:
                at = max(found, match.start() + 1)

    def at(self, match: re.Match[str]) -> Span | int:
        """Return the calls that a mark begins, or where to go on."""
        text, mark, start = self.text, match[0], match.start()
        if mark == THINK[0]:
            end = text.find(THINK[1], start)
            return len(text) if end < 0 else end + len(THINK[1])
        if mark == "```":
            return self._fence(start)
        if mark == "`":
            line = text.find("\n", start) % (len(text) + 1)
            end = text.find("`", start + 1, line)
            return start + 1 if end < 0 else end + 1
        if mark in OPENINGS:
            return self._tagged(start)
        return self._alone(match.end() - 1)

    def begins_line(self, start: int) -> bool:
        """Return whether nothing stands before a place in its line."""
        return not self.text[self.text.rfind("\n", 0, start) + 1 : start].strip()

    def _cited(self, start: int, end: int | None = None) -> bool:
        """Return whether a call from `start` to `end` stands in the middle of a line."""
        before = self.text[self.text.rfind("\n", 0, start) + 1 : start]
        if not before.strip() or before.rstrip().endswith(THINK[1]):
            return False
        if end is None:
            return False
        line = self.text.find("\n", end)
        after = self.text[end : line if line >= 0 else len(self.text)].strip()
        return bool(after) and not after.startswith(OPENINGS)

    def _tagged(self, start: int) -> Span | int:
        text = self.text
        mark = next(each for each in OPENINGS if text.startswith(each, start))
        at = start + len(mark)
        if mark in ("<function=", "functools["):
            at = start if mark == "<function=" else at - 1
        calls: list[ToolCall] = []
        end = at
        while True:
            begin = space(text, end)
            if mark.startswith("<\uff5c") and text.startswith(OPENINGS[-1], begin):
                begin += len(OPENINGS[-1])
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
        return Span(start, end, calls)

    def _one(self, start: int, mark: str) -> tuple[list[ToolCall], int] | None:
        """Return the calls of one value after an opening, and where it ends."""
        text = self.text
        if function := _FUNCTION.match(text, start):
            name = function[1].strip()
            if name not in self.functions:
                return None
            close = text.find(_FUNCTION_END, function.end())
            call = self._function(name, text[function.end() : len(text) if close < 0 else close])
            return (
                ([call], len(text) if close < 0 else close + len(_FUNCTION_END)) if call else None
            )
        named = _MISTRAL if mark == "[TOOL_CALLS]" else _DEEPSEEK
        if match := named.match(text, start):
            name = next(group for group in match.groups() if group)
            value, end = self._json_at(match.end())
            call = self._call(name, value) if end else None
            if call is None:
                return None
            fence = _AFTER_JSON.match(text, end)
            return [call], fence.end() if fence and "```json" in match[0] else end
        value, end = self._json_at(start)
        if end:
            calls = self.calls_of(value)
            return (calls, end) if calls else None
        return self._python(start)

    def _json_at(self, start: int) -> tuple[object, int]:
        """Return the JSON object or list that begins here and its end; 0 where there is none."""
        if self.left < 0 or self.text[start : start + 1] not in ("{", "["):
            return None, 0
        try:
            return _decoder.raw_decode(self.text, start)
        except ValueError as error:
            self.left -= getattr(error, "pos", len(self.text)) - start
        except RecursionError:
            self.left -= _DEEP_COST
        return None, 0

    def _alone(self, start: int) -> Span | int:
        """Return the calls of JSON or Python that stands alone from here to the end."""
        text = self.text
        values, end = self.json_run(start)
        if not values:
            python = self._python(start)
            if python and python[1] >= self.last:
                return Span(start, len(text), python[0])
            return start + 1
        calls: list[ToolCall] = []
        for value in values:
            found = self.calls_of(value)
            if not found:
                return end
            calls += found
        return Span(start, len(text), calls) if end >= self.last else end

    def json_run(self, start: int) -> tuple[list[object], int]:
        """Return the JSON values that follow each other from here, and where they end."""
        values: list[object] = []
        end = start
        while True:
            value, after = self._json_at(space(self.text, end))
            if not after:
                return values, end
            values.append(value)
            end = after

    def fence(self, start: int) -> Fence:
        """Return the fence that begins here."""
        opening = _FENCE.match(self.text, start)
        assert opening is not None  # it begins with the mark
        close = self.text.find("```", opening.end())
        if close < 0:
            return Fence(opening[1], opening.end(), None, len(self.text))
        return Fence(opening[1], opening.end(), close, close + len("```"))

    def _fence(self, start: int) -> Span | int:
        fence = self.fence(start)
        ends = fence.close is not None and fence.end >= self.last
        if ends and fence.info in FENCES and self.begins_line(start):
            calls = self.values(self.text[fence.start : fence.close])
            if calls:
                return Span(start, fence.end, calls)
        return fence.end

    def values(self, text: str) -> list[ToolCall]:
        """Return the calls of a text that holds nothing else."""
        inner = CallReader(text.strip(), self.functions)
        found = inner._alone(0) if inner.text[:1] in ("{", "[") else inner._python(0)
        if isinstance(found, Span):
            return found.calls
        if isinstance(found, tuple) and found[1] == len(inner.text):
            return found[0]
        return []

    def calls_of(self, value: object) -> list[ToolCall]:
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
        if not isinstance(name, str) or name not in self.functions:
            return None
        if isinstance(arguments, str):
            value, end = _json_at(arguments, space(arguments, 0))
            arguments = value if end and not arguments[end:].strip() else arguments.strip() or None
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict) or not _is_strict(arguments):
            return None
        return ToolCall(name, arguments)

    def _function(self, name: str, body: str) -> ToolCall | None:
        """Return a call whose arguments are JSON, or one tag for each."""
        if name not in self.functions:
            return None
        if "<parameter=" not in body:
            return self._call(name, body)
        schema = self.functions[name]
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
        text, match = self.text, PYTHON.match(self.text, start)
        known = match is not None and (match[1] == "print" or match[1] in self.functions)
        if not known or len(text) - start > _LONGEST_PYTHON or self.left < 0:
            return None
        end = text.rfind("]" if text[start] == "[" else ")", start) + 1
        self.left -= _PYTHON_COST * max(end - start, 0)
        names = OddNames(self.functions)
        try:
            body = ast.parse(names.hide(text[start:end]), mode="exec").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
        calls: list[ToolCall] = []
        for statement in body:
            value = statement.value if isinstance(statement, ast.Expr) else None
            parts = value.elts if isinstance(value, ast.List) else [value]
            for part in parts:
                call = self._python_call(part, names)
                if call is None:
                    return None
                calls.append(call)
        return (calls, end) if calls else None

    def _python_call(self, node: ast.AST | None, names: OddNames) -> ToolCall | None:
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
            and len(node.args) == 1
            and not node.keywords
        ):
            node = node.args[0]
        if not isinstance(node, ast.Call) or node.args:
            return None
        try:
            name = names.show(ast.unparse(node.func))
            arguments = {each.arg: ast.literal_eval(each.value) for each in node.keywords}
        except (ValueError, TypeError, RecursionError, MemoryError):
            return None
        if any(not isinstance(key, str) for key in arguments):
            return None
        return self._call(name, names.show(arguments))


def space(text: str, start: int) -> int:
    """Return where white space and separators of calls end."""
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
