"""The operator's policy on watermarks and guides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

from paceline.control.guides.base import GuideMethod, guided, parse_guide
from paceline.control.guides.cfg import Cfg
from paceline.core import Request
from paceline.errors import MethodError, RequestError
from paceline.kvcache.base import Policy, parse_policy
from paceline.watermarks.base import Watermark, parse_watermark

if TYPE_CHECKING:
    from paceline.lm import LM

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class OperatorPolicy:
    """How answers may be watermarked and guided, and how their caches are bounded.

    Attributes:
        watermark: of every answer.
        choice: requests may bring a watermark of their own, or turn it off.
        guides: by the names that requests give; their models are the operator's.
        kv_policy: bounds the cache of every request.
        kv_policy_choice: requests may bring a KV policy of their own, or turn it off.
    """

    watermark: Watermark | None = None
    choice: bool = False
    guides: Mapping[str, GuideMethod] = field(default_factory=dict)
    kv_policy: Policy | None = None
    kv_policy_choice: bool = False

    def watermark_of(self, requested: str | Literal[False] | None) -> Watermark | None:
        """Return the watermark of a request.

        Args:
            requested: what the request says: a watermark, False for none, None for the server's.

        Raises:
            PacelineError: requests may not choose here, or the watermark is malformed.
        """
        if requested is None:
            return self.watermark
        if not self.choice:
            raise RequestError("this server chooses the watermark; leave watermark out")
        return parse_watermark(requested) if requested is not False else None

    def kv_policy_of(self, requested: str | Literal[False] | None) -> Policy | None:
        """Return the KV policy of a request.

        Args:
            requested: what the request says: a policy, False for none, None for the server's.

        Raises:
            PacelineError: requests may not choose here, or the policy is malformed.
        """
        if requested is None:
            return self.kv_policy
        if not self.kv_policy_choice:
            raise RequestError("this server chooses the KV policy; leave kv_policy out")
        return parse_policy(requested) if requested is not False else None

    def guides_of(self, names: Iterable[str]) -> list[GuideMethod]:
        """Return the guides with these names.

        Raises:
            RequestError: a name is unknown.
        """
        guides = []
        for name in names:
            if name not in self.guides:
                known = ", ".join(self.guides)
                here = f"this server has {known}" if known else "this server has no guides"
                raise RequestError(f"guide is {name[:64]!r}, {here}")
            guides.append(self.guides[name])
        return guides


def negative(text: str, scale: float, stop: float) -> Cfg:
    """Return classifier-free guidance away from a text, which is used verbatim.

    Raises:
        RequestError: a number is out of range.
    """
    return Cfg(negative=text, scale=scale, stop=stop)


def parse_guides(texts: Iterable[str]) -> dict[str, GuideMethod]:
    """Parse named guides, `NAME=GUIDE` each, with GUIDE as for `--guide`.

    Raises:
        PacelineError: a name or a guide is malformed, or a name is given twice.
    """
    guides: dict[str, GuideMethod] = {}
    for text in texts:
        name, equals, guide = text.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise RequestError(
                f"guides has {text[:80]!r}, expected NAME=GUIDE, e.g. calm=proxy:tuned,base"
            )
        if name in guides:
            raise RequestError(f"two guides are called {name}; rename one of them")
        guides[name] = parse_guide(guide)
    return guides


def open_guides(lm: LM, methods: Mapping[str, GuideMethod]) -> None:
    """Load the models of guides, so that no request waits for one.

    Raises:
        PacelineError: a model cannot be loaded; names the guide.
    """
    for name, method in methods.items():
        try:
            guided(Request((0,), max_new_tokens=1), [method], lm.guide_models)  # nothing is run
        except (MethodError, RequestError) as error:
            raise MethodError(f"the guide {name}: {error}") from None


def shown(mark: Watermark) -> str:
    """Return a watermark's kind and settings, with the key hidden."""
    rest = [f"{each.name}={getattr(mark, each.name)}" for each in fields(mark)]
    return ",".join(["key=***", f"kind={mark.name}", *rest[1:]])
