"""Contract of watermarks: key, marking, detection."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from paceline.core import Request
from paceline.errors import MethodError, RequestError, unknown
from paceline.method_spec import MethodSpec, parse_spec
from paceline.registry import Method, watermarks


@dataclass(frozen=True, slots=True)
class Detection:
    """Result of a detector on a text.

    Attributes:
        p: p-value: probability that a text independent of the key scores as high; an upper bound
            if the score is discrete.
        score: the test statistic, named by `measure`.
        measure: alignment, z or weighted mean.
        scored: number of tokens that count.
    """

    p: float
    score: float
    measure: str
    scored: int


@dataclass(frozen=True)
class Watermark(Method, ABC):
    """Settings of a watermark. `mark` adds it to a request, `detect` finds it in a text.

    Attributes:
        key: secret text; anyone who has it can detect and forge the watermark. Not shown by `repr`.
    """

    key: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.key:
            raise RequestError("the watermark's key is empty; give a secret text, key=...")
        if self.key != self.key.encode(errors="replace").decode():
            raise RequestError("the watermark's key contains half a character (a lone surrogate)")

    @property
    def longest(self) -> int | None:
        """Maximum number of output tokens that it can mark; None: any number."""
        return None

    @property
    def seed(self) -> int:
        """A 64-bit hash of the key."""
        return int.from_bytes(blake2b(self.key.encode(), digest_size=8).digest(), "little")

    @abstractmethod
    def mark(self, request: Request) -> Request:
        """Return the request with the watermark, which acts after all controls.

        Raises:
            PacelineError: the request cannot carry it.
        """

    @abstractmethod
    def detect(self, tokens: Sequence[int], resamples: int = 999) -> Detection:
        """Test a text for the watermark.

        Args:
            tokens: the text, tokenised as by the model that is supposed to have written it.
            resamples: number of random keys to compare with, where the distribution of the score
                is unknown.

        Raises:
            RequestError: the text is too short.
        """


_NAMED = re.compile(r"\s*\w+\s*:")


def parse_watermark(text: str) -> Watermark:
    """Build the watermark that `KIND:key=SECRET[,SETTING=VALUE...]` names.

    `key=SECRET[,kind=KIND][,SETTING=VALUE...]` is the earlier spelling.

    Raises:
        PacelineError: what is missing, unknown, given twice or out of range.
    """
    if _NAMED.match(text):
        try:
            spec = parse_spec(text.strip())
        except MethodError:
            raise MethodError(  # without its text, which may be part of a key
                "a setting of the watermark has no value or is given twice; write KIND:key=SECRET, "
                "and a key with a comma in JSON quotes"
            ) from None
        if not spec.settings.get("key"):
            raise MethodError("a watermark needs a key; write KIND:key=SECRET")
        mark: Watermark = watermarks.build(spec)
        return mark
    given: dict[str, str] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        name, equals, value = item.partition("=")
        if not equals:
            raise MethodError(  # without the item: it may be part of a key
                "an item of the watermark has no value; write NAME=VALUE, and no comma in the key"
            )
        if name in given:
            raise MethodError(f"{name} is given twice in the watermark; give one")
        given[name] = value
    if "key" not in given:
        raise MethodError("a watermark needs a key; write key=SECRET")
    kind = given.pop("kind", "exponential")
    if kind not in watermarks.methods():
        raise MethodError(unknown("watermark", kind, watermarks.methods()))
    watermark: Watermark = watermarks.build(MethodSpec(kind, given))
    return watermark


def enough(count: int, min_tokens: int) -> None:
    """Refuse a text without evidence.

    Raises:
        RequestError: fewer than `min_tokens` of `count` tokens can be scored.
    """
    if count < min_tokens:
        raise RequestError(
            f"{count} tokens of the text can be scored, expected at least {min_tokens}; "
            "give more text"
        )
