"""What an operator lets answers be marked and steered by: a watermark, and guides by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

from paceline.control.guides.base import GuideMethod, guided, parse_guide
from paceline.control.guides.cfg import Cfg
from paceline.core import Request
from paceline.errors import MethodError, RequestError
from paceline.watermarks.base import Watermark, parse_watermark

if TYPE_CHECKING:
    from paceline.lm import LM

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class OperatorPolicy:
    """See the module's text.

    Attributes:
        watermark: of every answer.
        choice: requests may bring a watermark of their own, or do without.
        guides: those that requests may name; their models are the operator's.
    """

    watermark: Watermark | None = None
    choice: bool = False
    guides: Mapping[str, GuideMethod] = field(default_factory=dict)

    def mark(self, wish: str | Literal[False] | None) -> Watermark | None:
        """The watermark of a request that wishes for its own, for none, or says nothing.

        Raises:
            PacelineError: it may not choose, or what it wishes for is none.
        """
        if wish is None:
            return self.watermark
        if not self.choice:
            raise RequestError("this server chooses the watermark; leave watermark out")
        return parse_watermark(wish) if wish is not False else None

    def named(self, names: Iterable[str]) -> list[GuideMethod]:
        """The guides of these names.

        Raises:
            RequestError: one is not here, or there are none.
        """
        found = []
        for name in names:
            if name not in self.guides:
                known = ", ".join(self.guides)
                here = f"this server has {known}" if known else "this server has no guides"
                raise RequestError(f"guide is {name[:64]!r}, {here}")
            found.append(self.guides[name])
        return found


def negative(text: str, scale: float, stop: float) -> Cfg:
    """Classifier-free guidance away from a text, which is taken as it is.

    Raises:
        RequestError: a number is out of range.
    """
    return Cfg(negative=json.dumps(text), scale=scale, stop=stop)


def parse_guides(texts: Iterable[str]) -> dict[str, GuideMethod]:
    """Guides by name, from `NAME=GUIDE` each, GUIDE being as in `--guide`.

    Raises:
        PacelineError: a name or a guide cannot be, or one name is there twice.
    """
    found: dict[str, GuideMethod] = {}
    for text in texts:
        name, equals, guide = text.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise RequestError(
                f"guides has {text[:80]!r}, expected NAME=GUIDE, e.g. calm=proxy:tuned,base"
            )
        if name in found:
            raise RequestError(f"two guides are called {name}; rename one of them")
        found[name] = parse_guide(guide)
    return found


def open_guides(lm: LM, methods: Mapping[str, GuideMethod]) -> None:
    """Open the models of guides, so that no request waits for one.

    Raises:
        PacelineError: one cannot be had, named.
    """
    for name, method in methods.items():
        try:
            guided(Request((0,), max_new_tokens=1), [method], lm.guide_models)  # nothing is run
        except (MethodError, RequestError) as error:
            raise MethodError(f"the guide {name}: {error}") from None


def shown(mark: Watermark) -> str:
    """A watermark's kind and settings without its key."""
    rest = [f"{each.name}={getattr(mark, each.name)}" for each in fields(mark)]
    return ",".join(["key=***", f"kind={mark.name}", *rest[1:]])
