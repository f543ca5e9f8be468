"""What the files of this folder share: the contract of a watermark, its key, its verdict."""

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
    """What a detector says of a text.

    Attributes:
        p: chance that a text which knows nothing of the key scores as high; at most, where the
            score is discrete.
        score: what is compared; `measure` names it.
        measure: alignment, z or weighted mean.
        scored: tokens that count.
    """

    p: float
    score: float
    measure: str
    scored: int


@dataclass(frozen=True)
class Watermark(Method, ABC):
    """Settings of a watermark: its fields. `mark` puts it into a request, `detect` finds it.

    Attributes:
        key: secret text; who has it can detect, and forge. Not shown by `repr`.
    """

    key: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.key:
            raise RequestError("the watermark's key is empty; give a secret text, key=...")
        if self.key != self.key.encode(errors="replace").decode():
            raise RequestError("the watermark's key holds half a character (a lone surrogate)")

    @property
    def longest(self) -> int | None:
        """Most tokens of an output that it can mark; None: any number."""
        return None

    @property
    def seed(self) -> int:
        """64 bits of the key."""
        return int.from_bytes(blake2b(self.key.encode(), digest_size=8).digest(), "little")

    @abstractmethod
    def mark(self, request: Request) -> Request:
        """The request with the watermark, which acts after all of its controls.

        Raises:
            PacelineError: the request leaves no room for it, in one sentence.
        """

    @abstractmethod
    def detect(self, tokens: Sequence[int], resamples: int = 999) -> Detection:
        """Look for the watermark in a text.

        Args:
            tokens: of the text, in the tokens of the model that is said to have written it.
            resamples: random keys to compare with, where the law of the score is not known.

        Raises:
            RequestError: the text is too short to say anything.
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
    found: Watermark = watermarks.build(MethodSpec(kind, given))
    return found


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
