"""How many choices a body requests, and whether they are compared or searched for."""

from __future__ import annotations

from typing import NamedTuple

from paceline.compatibility import Side, check
from paceline.core import Request
from paceline.decoding.strategies.base import Strategy
from paceline.decoding.strategies.beam import Beam
from paceline.decoding.strategies.best_of import comparison_sides
from paceline.decoding.strategies.contrastive import ContrastiveSearch
from paceline.errors import RequestError
from paceline.registry import strategies
from paceline.serving.api.schemas import MultiChoiceBody

_BEAM_ONLY = ("length_penalty", "early_stopping")
_WIDTH = 4  # beams by default, as in transformers
_NOT_SEARCHED = {
    "stream": "returns its results at the end only",
    "logprobs": "reports no logprobs",
    "speculation": "drafts nothing",
    "prediction": "drafts nothing",
    "trace": "drafts nothing",
}


class ChoicePlan(NamedTuple):
    """What to run for each prompt.

    Attributes:
        requests: number of requests, each with its own seed; one for a search.
        compared: only the most likely choices are returned (`best_of`).
        strategy: of the search, None without one.
    """

    requests: int
    compared: bool = False
    strategy: Strategy | None = None


def plan_choices(body: MultiChoiceBody, prompts: int, max_choices: int) -> ChoicePlan:
    """Return what to run for each prompt of a body.

    Args:
        body: of the request.
        prompts: their number.
        max_choices: maximum number of choices over all prompts.

    Raises:
        PacelineError: too many choices, or the body contradicts itself.
    """
    n, strategy = body.n or 1, _strategy(body)
    width = getattr(strategy, "width", max(n, body.best_of or 1))
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true")
    if body.best_of is not None and body.best_of < n:
        raise RequestError(f"best_of is {body.best_of}, expected n = {n} or more")
    if width * prompts > max_choices:
        raise RequestError(
            f"{prompts} prompts with {width} answers each exceed the maximum of {max_choices}"
        )
    if strategy:
        return ChoicePlan(1, strategy=strategy)
    if width > n and body.stream:
        check({Side.COMPARED_ANSWERS: f"best_of {width}", Side.STREAM: "stream"})
    return ChoicePlan(width, compared=width > n)


def check_differ(request: Request, count: int) -> None:
    """Refuse to compare choices that would be identical, as the strategy `best_of` does.

    Raises:
        RequestError: the temperature is 0, or the watermark leaves no choice.
    """
    check(comparison_sides(request, count))


def _strategy(body: MultiChoiceBody) -> Strategy | None:
    """Return the search strategy of a body, None if it requests none."""
    if body.strategy is None and not body.use_beam_search:
        for name in _BEAM_ONLY:
            if getattr(body, name) is not None:
                raise RequestError(f"{name} needs use_beam_search: true")
        return None
    field = "strategy" if body.strategy is not None else "use_beam_search"
    for name, why in _NOT_SEARCHED.items():
        value = getattr(body, name)
        if value is not None and value is not False:
            raise RequestError(f"{field} {why}; leave {name} out")
    return _beam(body) if body.strategy is None else _named(body, body.strategy)


def _beam(body: MultiChoiceBody) -> Beam:
    n = body.n or 1
    width = max(body.best_of or max(n, _WIDTH), n)
    penalty = 1.0 if body.length_penalty is None else body.length_penalty
    return Beam(width, n, penalty, str(body.early_stopping or False).lower())


def _named(body: MultiChoiceBody, text: str) -> Strategy:
    for name in ("use_beam_search", "n", "best_of", *_BEAM_ONLY):
        if getattr(body, name) is not None:
            raise RequestError(f"strategy has its own settings; leave {name} out")
    if text.partition(":")[0] == "best_of":
        raise RequestError("best_of is a separate field; give best_of: 8")
    strategy = strategies.parse(text)
    if not isinstance(strategy, Beam | ContrastiveSearch):
        raise RequestError(
            f"the strategy {strategy.name} is not available over the API, which has beam, "
            "diverse and contrastive; use `paceline generate --strategy`"
        )
    return strategy
