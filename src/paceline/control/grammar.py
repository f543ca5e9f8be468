"""Grammars: JSON schemas, regular expressions and Lark rules."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from threading import Lock, Thread, stack_size
from typing import Any
from weakref import WeakKeyDictionary, ref

from paceline.compatibility import Side, check
from paceline.control.base import ControlMethod
from paceline.control.structured.matcher import Matcher, refusal
from paceline.control.structured.schema_rewrite import rewrite
from paceline.core import Control, Exactness, Request
from paceline.errors import MethodError, RequestError
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Source, controls

_LONGEST = 1 << 20  # characters of a grammar, at most
_COMPILED = 64  # compiled grammars kept for each model
_STACK = 1 << 29  # bytes of address space; only pages that are touched take memory
_CACHED_TEXTS = 4096  # tokenised texts that are kept
_KINDS = ("regex", "json", "lark")
_SPACES: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',  # with \u a key could name a listed property otherwise
}
_DEEPEST = 100  # levels of nesting in a schema; much deeper ones overflow the compiler's stack


@controls.register("grammar", Exactness.EXACT)
@dataclass(frozen=True)
class Grammar(ControlMethod):
    """Restrict the output to a grammar, up to its end unless `max_new_tokens` cuts it.

    A token is allowed if some text that follows the grammar continues with it, and a stop token
    where the text is complete. Where only one continuation is left, its tokens are those that the
    tokenizer gives for it; the `forced` drafter drafts them. Drafted nodes that break the grammar
    are dropped before a pass. Grammars are compiled by llguidance (`paceline[grammar]`), once for
    a model.

    JSON objects have their keys in the order of the schema, with spaces only after commas and
    colons; llguidance's `x-guidance` in the schema can change the spaces. A schema is rewritten
    before it is compiled where llguidance would take or refuse the wrong values; a keyword that
    cannot be enforced is refused by name, and an unknown `format` is an annotation.

    Attributes:
        text: the grammar, at most a million characters.
        kind: `regex` (the whole output matches it), `json` (a JSON schema; `{}` is any JSON value)
            or `lark` (llguidance's dialect of Lark; the rule is `start`). Default `regex`.
    """

    text: str
    kind: str = "regex"

    order = 38
    examples = ("grammar:text=( the end| of a day|a| b[a-z]*)+[.]",)
    source = Source(
        title="llguidance, github.com/guidance-ai/llguidance",
        note="forced tokens as drafts are ours",
    )
    catalogue = (276, 117)
    missing = {
        117: "its stack that branches and rolls back; llguidance reads tokens with Earley items"
    }

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
        """Make the grammar of a JSON schema: text, a JSON value, or a pydantic model.

        Raises:
            RequestError: JSON cannot hold the schema.
        """
        made = getattr(schema, "model_json_schema", None)
        value = made() if callable(made) else schema
        if isinstance(value, str):
            return cls(value, "json")
        try:
            return cls(json.dumps(value), "json")
        except (TypeError, ValueError, RecursionError):
            raise RequestError(
                "JSON cannot hold the schema; give a dict, JSON text or a pydantic model"
            ) from None

    @classmethod
    def choice(cls, texts: Iterable[str]) -> Grammar:
        """Make the grammar that allows exactly the given texts.

        Raises:
            RequestError: there is no text, or one is empty.
        """
        options = list(dict.fromkeys(texts))
        if not options or "" in options:
            raise RequestError("a choice needs texts that are not empty, as in yes|no")
        rules = " | ".join(json.dumps(text, ensure_ascii=False) for text in options)
        return cls(f"start: {rules}", "lark")

    def term(self) -> str | None:
        """Return the grammar as a term of other Lark rules; None if it has several rules."""
        if self.kind == "json":
            return embedded(json.loads(self.text))
        if self.kind == "regex":
            escaped = re.sub(r"\\.|[/\n]", _escaped, self.text, flags=re.DOTALL)
            return f"/{escaped}/" if escaped else '""'
        rule, _, term = self.text.partition(": ")
        return f"({term})" if rule == "start" and "\n" not in term else None

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Return a matcher that starts at the end of the prompt.

        Raises:
            MethodError: llguidance is not installed.
            RequestError: the grammar is invalid, unsupported, too large, or allows nothing.
        """
        if not request.stop_tokens:
            check({Side.GRAMMAR: "a grammar", Side.NO_STOP_TOKEN: "a request without a stop token"})
        stops = tuple(sorted(request.stop_tokens))

        def recompile() -> Any:
            _known[vocabulary][1].pop((self, stops), None)
            return _compiled(self, vocabulary, stops)

        return Matcher(_compiled(self, vocabulary, stops), request, vocabulary, recompile)


# ------------------------------------------------------------------------------------ compiling

_Known = tuple[dict[tuple[int, ...], Any], dict[Any, Any]]
_known: WeakKeyDictionary[Vocabulary, _Known] = WeakKeyDictionary()


class _Tokens:
    """A vocabulary in llguidance's interface. Holds it weakly, so that a model can be freed."""

    def __init__(self, vocabulary: Vocabulary, stops: tuple[int, ...]) -> None:
        self._vocabulary = ref(vocabulary)
        self._tokenised: dict[bytes, list[int]] = {}
        self.tokens = vocabulary.pieces
        self.eos_token_id, self.bos_token_id = stops[0], None
        self.special_token_ids = sorted({*vocabulary.tokenizer.silent, *stops})

    def __call__(self, text: str | bytes) -> list[int]:
        vocabulary = self._vocabulary()
        if vocabulary is None:
            return []
        text = text if isinstance(text, bytes) else text.encode()
        if text not in self._tokenised:  # the keys of a schema come again and again
            if len(self._tokenised) >= _CACHED_TEXTS:
                self._tokenised.clear()
            self._tokenised[text] = vocabulary.inside(text)
        return self._tokenised[text]


def _compiled(grammar: Grammar, vocabulary: Vocabulary, stops: tuple[int, ...]) -> Any:
    """Return a matcher at the beginning of a grammar, from the cache or compiled."""
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
            "json": _json_grammar,
        }

        def compiled() -> Any:
            matcher = LLMatcher(tokenizers[stops], make[grammar.kind](grammar.text), log_level=0)
            if not matcher.is_error():
                matcher.compute_bitmask()
            return matcher

        matcher = _on_large_stack(compiled)
        if matcher.is_error():
            raise RequestError(refusal(matcher))
        while len(matchers) >= _COMPILED:
            del matchers[next(iter(matchers))]
        matchers[key] = matcher
    return matchers[key]


def _json_grammar(text: str) -> str:
    from llguidance import LLMatcher

    grammar: str = LLMatcher.grammar_from_json_schema(
        json.dumps(rewrite(json.loads(text))),
        defaults=_SPACES,
        overrides={"lenient": False, "coerce_one_of": False},
    )
    return grammar


_one_at_a_time = Lock()


def _on_large_stack(call: Callable[[], Any]) -> Any:
    """Run `call` in a thread with a large stack, as the compiler recurses along rules.

    Raises:
        RequestError: there is no memory for the stack, the compiler gave up, or `call` refuses.
    """
    results: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # a panic of the compiler is not an Exception
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
    if failed and isinstance(failed[0], RequestError):
        raise failed[0]
    if failed:
        message = " ".join(str(failed[0]).split())
        raise RequestError(f"the grammar cannot be used: {message:.200}")
    return results[0]


def _check_json(text: str) -> None:
    """Refuse text that is not a JSON object, or that is nested too deeply.

    Raises:
        RequestError: says what is wrong and where.
    """
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
        raise RequestError("the schema is not an object; {} allows any JSON value")


def embedded(schema: Mapping[str, Any]) -> str:
    """Return a JSON schema in the form in which Lark rules can embed it.

    Raises:
        RequestError: as `Grammar.schema`.
    """
    rewritten = rewrite(json.loads(Grammar.schema(dict(schema)).text))
    requested = rewritten.get("x-guidance")
    requested = requested if isinstance(requested, Mapping) else {}
    options = {**_SPACES, **requested, "lenient": False, "coerce_one_of": False}
    return f"%json {json.dumps({**rewritten, 'x-guidance': options})}"


def _escaped(match: re.Match[str]) -> str:
    """Return a part of a regular expression as it is written between slashes."""
    return {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}.get(match[0], match[0])


def _inner(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()
