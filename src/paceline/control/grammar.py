"""Grammars: the output is a JSON value, matches a regular expression, or follows Lark rules."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from threading import Lock, Thread, stack_size
from typing import Any
from weakref import WeakKeyDictionary, ref

from paceline.control.base import ControlMethod
from paceline.control.structured.matcher import Matcher, refusal
from paceline.core import Control, Exactness, Request
from paceline.errors import MethodError, RequestError
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Source, controls

_LONGEST = 1 << 20  # characters of a grammar
_COMPILED = 64  # grammars kept for each model
_STACK = 1 << 29  # bytes of address space, of which only what is used takes memory
_DIVIDED = 4096  # texts whose tokens are remembered
_KINDS = ("regex", "json", "lark")
_SPACES: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_DEEPEST = 100  # levels of a schema; the compiler's own limit ends in a stack overflow beyond


@controls.register("grammar", Exactness.EXACT)
@dataclass(frozen=True)
class Grammar(ControlMethod):
    """The output follows a grammar to its end, unless `max_new_tokens` cuts it.

    Only tokens with which the text can still follow it are allowed, and the end only where it is
    whole. Where it leaves one continuation, that is the tokens that the tokenizer makes of it:
    the `forced` drafter offers them, and drafts that break the grammar are dropped before a pass.
    Compiled once for a model, by llguidance (`paceline[grammar]`).

    JSON has its keys in the order of the schema, and spaces after commas and colons only;
    `x-guidance` in the schema, which is llguidance's, can change the spaces. A keyword that cannot
    be enforced is refused by name.

    Attributes:
        text: the grammar, at most a million characters.
        kind: `regex` (the whole output matches it), `json` (a JSON schema; `{}` is any JSON value)
            or `lark` (llguidance's dialect of Lark; the rule is `start`). Default `regex`.
    """

    text: str
    kind: str = "regex"

    order = 38
    source = Source(
        title="llguidance, github.com/guidance-ai/llguidance",
        note="forced tokens as drafts are ours",
    )

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise MethodError(f"grammar:kind is {self.kind!r}, expected {', '.join(_KINDS)}")
        if len(self.text) > _LONGEST:
            raise RequestError(
                f"the grammar has {len(self.text)} characters, expected at most {_LONGEST}"
            )
        if self.kind == "json":
            _check_json(self.text)

    @classmethod
    def schema(cls, schema: object) -> Grammar:
        """Of a JSON schema: as text, as what JSON has, or a pydantic model."""
        made = getattr(schema, "model_json_schema", None)
        found = made() if callable(made) else schema
        if isinstance(found, str):
            return cls(found, "json")
        try:
            return cls(json.dumps(found), "json")
        except (TypeError, ValueError, RecursionError):
            raise RequestError("the schema is nothing that JSON can hold") from None

    @classmethod
    def choice(cls, texts: Iterable[str]) -> Grammar:
        """One of `texts`, which may not be empty.

        Raises:
            RequestError: there is none, or one is empty.
        """
        found = list(dict.fromkeys(texts))
        if not found or "" in found:
            raise RequestError("a choice needs texts that are not empty, as in yes|no")
        return cls("start: " + " | ".join(json.dumps(t, ensure_ascii=False) for t in found), "lark")

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """A matcher at the end of the prompt.

        Raises:
            MethodError: llguidance is not installed.
            RequestError: the grammar is invalid, unsupported, too large, or allows nothing.
        """
        if not request.stop_tokens:
            raise RequestError(
                "a grammar ends with a stop token, and this request has none; "
                "leave --ignore-eos away, or take a checkpoint that names one"
            )
        stops = tuple(sorted(request.stop_tokens))

        def anew() -> Any:
            _known[vocabulary][1].pop((self, stops), None)
            return _compiled(self, vocabulary, stops)

        return Matcher(_compiled(self, vocabulary, stops), request, vocabulary, anew)


# ------------------------------------------------------------------------------------ compiling

_Known = tuple[dict[tuple[int, ...], Any], dict[Any, Any]]
_known: WeakKeyDictionary[Vocabulary, _Known] = WeakKeyDictionary()


class _Tokens:
    """A vocabulary as llguidance asks for one; does not keep it, so that a model can go."""

    def __init__(self, vocabulary: Vocabulary, stops: tuple[int, ...]) -> None:
        self._vocabulary = ref(vocabulary)
        self._divided: dict[bytes, list[int]] = {}
        self.tokens = vocabulary.pieces
        self.eos_token_id, self.bos_token_id = stops[0], None
        self.special_token_ids = sorted({*vocabulary.tokenizer.silent, *stops})

    def __call__(self, text: str | bytes) -> list[int]:
        vocabulary = self._vocabulary()
        if vocabulary is None:
            return []
        text = text if isinstance(text, bytes) else text.encode()
        if text not in self._divided:  # the keys of a schema are asked for again and again
            if len(self._divided) >= _DIVIDED:
                self._divided.clear()
            self._divided[text] = vocabulary.inside(text)
        return self._divided[text]


def _compiled(grammar: Grammar, vocabulary: Vocabulary, stops: tuple[int, ...]) -> Any:
    """A matcher at the beginning of a grammar."""
    try:
        from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
    except ImportError:
        raise MethodError("grammars need llguidance; pip install 'paceline[grammar]'") from None
    tokenizers, matchers = _known.setdefault(vocabulary, ({}, {}))
    if stops not in tokenizers:
        tokenizers[stops] = LLTokenizer(
            TokenizerWrapper(_Tokens(vocabulary, stops)), eos_token=list(stops)
        )
    key = (grammar, stops)
    if key not in matchers:
        make: dict[str, Callable[[str], str]] = {
            "regex": LLMatcher.grammar_from_regex,
            "lark": LLMatcher.grammar_from_lark,
            "json": partial(
                LLMatcher.grammar_from_json_schema, defaults=_SPACES, overrides={"lenient": False}
            ),
        }

        def compiled() -> Any:
            matcher = LLMatcher(tokenizers[stops], make[grammar.kind](grammar.text), log_level=0)
            if not matcher.is_error():
                matcher.compute_bitmask()
            return matcher

        matcher = _deep(compiled)
        if matcher.is_error():
            raise RequestError(refusal(matcher))
        while len(matchers) >= _COMPILED:
            del matchers[next(iter(matchers))]
        matchers[key] = matcher
    return matchers[key]


_one_at_a_time = Lock()


def _deep(call: Callable[[], Any]) -> Any:
    """What `call` gives on a stack of its own: the compiler recurses along references and rules.

    Raises:
        RequestError: there is no memory for the stack, or the compiler gave up.
    """
    found: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:  # a panic of the compiler is no Exception
            failed.append(error)

    with _one_at_a_time:
        before = stack_size(_STACK)
        try:
            thread = Thread(target=run, daemon=True)
            thread.start()
        except (RuntimeError, MemoryError):
            raise RequestError("there is no memory to compile a grammar") from None
        finally:
            stack_size(before)
    thread.join()
    if failed:
        message = " ".join(str(failed[0]).split())
        raise RequestError(f"the grammar cannot be used: {message:.200}")
    return found[0]


def _check_json(text: str) -> None:
    """Refuse what is no JSON, and what is nested so deep that it can only be hostile."""
    try:
        schema = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"the schema is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from None
    except (RecursionError, ValueError):
        raise RequestError(f"the schema is nested more than {_DEEPEST} levels deep") from None
    level = [schema]
    for _ in range(_DEEPEST):
        level = [item for value in level for item in _inner(value)]
    if level:
        raise RequestError(f"the schema is nested more than {_DEEPEST} levels deep")
    if not isinstance(schema, dict):
        raise RequestError("the schema is no object; {} is that of any JSON value")


def embedded(schema: Mapping[str, Any]) -> str:
    """A JSON schema as a part of Lark rules.

    Raises:
        RequestError: as `Grammar.schema`.
    """
    checked = Grammar.schema(dict(schema)).text
    asked = schema.get("x-guidance")
    options = {**_SPACES, **(asked if isinstance(asked, Mapping) else {}), "lenient": False}
    return f"%json {json.dumps({**json.loads(checked), 'x-guidance': options})}"


def _inner(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()
