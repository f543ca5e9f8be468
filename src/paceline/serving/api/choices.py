"""How many answers a body wants, compared or searched for, as other servers name it."""

from __future__ import annotations

from typing import NamedTuple

from paceline.control.capabilities import LowEntropy
from paceline.core import Request
from paceline.decoding.strategies.base import Strategy
from paceline.decoding.strategies.beam import Beam
from paceline.decoding.strategies.contrastive import ContrastiveSearch
from paceline.errors import RequestError
from paceline.registry import strategies
from paceline.serving.api.schemas import MultiChoiceBody

_BEAM_ONLY = ("length_penalty", "early_stopping")
_WIDTH = 4  # where the body says nothing: that of transformers
_NOT_SEARCHED = {
    "stream": "is told when all of it is known",
    "logprobs": "tells none",
    "speculation": "guesses nothing",
    "prediction": "guesses nothing",
    "trace": "guesses nothing",
}


class ChoicePlan(NamedTuple):
    """What is wanted for each prompt.

    Attributes:
        requests: so many, with a seed each; one for a search.
        compared: the likeliest are told, the others only compared with them.
        strategy: of the search.
    """

    requests: int
    compared: bool = False
    strategy: Strategy | None = None


def plan_choices(body: MultiChoiceBody, prompts: int, most: int) -> ChoicePlan:
    """What a body wants for each of its prompts, `most` answers in all.

    Raises:
        PacelineError: too much, or the body contradicts itself.
    """
    n, strategy = body.n or 1, _strategy(body)
    width = getattr(strategy, "width", max(n, body.best_of or 1))
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true")
    if body.best_of is not None and body.best_of < n:
        raise RequestError(f"best_of is {body.best_of}, expected n = {n} at least")
    if width * prompts > most:
        raise RequestError(f"{prompts} prompts with {width} answers each are more than {most}")
    if strategy:
        return ChoicePlan(1, strategy=strategy)
    if width > n and body.stream:
        raise RequestError("best_of cannot be streamed: all answers are compared first")
    return ChoicePlan(width, compared=width > n)


def check_differ(request: Request, count: int) -> None:
    """Refuse to compare answers that are the same, as the strategy best_of does.

    Raises:
        RequestError: as said.
    """
    if request.temperature == 0:
        raise RequestError(
            f"at temperature 0 all {count} answers of best_of are the same; give a temperature"
        )
    if any(isinstance(control, LowEntropy) for control in request.controls):
        raise RequestError(
            "the watermark all but settles what follows a prompt, so that the answers of best_of "
            "would hardly differ; take kind=exponential or kind=green, or leave best_of out"
        )


def _strategy(body: MultiChoiceBody) -> Strategy | None:
    """The search of a body; None where it asks for none."""
    if body.strategy is None and not body.use_beam_search:
        for name in _BEAM_ONLY:
            if getattr(body, name) is not None:
                raise RequestError(f"{name} needs use_beam_search: true")
        return None
    asked = "strategy" if body.strategy is not None else "use_beam_search"
    for name, why in _NOT_SEARCHED.items():
        value = getattr(body, name)
        if value is not None and value is not False:
            raise RequestError(f"{asked} {why}; leave {name} out")
    return _beam(body) if body.strategy is None else _named(body, body.strategy)


def _beam(body: MultiChoiceBody) -> Beam:
    n = body.n or 1
    width = max(body.best_of or max(n, _WIDTH), n)
    penalty = 1.0 if body.length_penalty is None else body.length_penalty
    return Beam(width, n, penalty, str(body.early_stopping or False).lower())


def _named(body: MultiChoiceBody, text: str) -> Strategy:
    for name in ("use_beam_search", "n", "best_of", *_BEAM_ONLY):
        if getattr(body, name) is not None:
            raise RequestError(f"strategy has settings of its own; leave {name} out")
    if text.partition(":")[0] == "best_of":
        raise RequestError("best_of is a field of its own; give best_of: 8")
    found = strategies.parse(text)
    if not isinstance(found, Beam | ContrastiveSearch):
        raise RequestError(
            f"the strategy {found.name} cannot be had over the API, which has beam, diverse and "
            "contrastive; use `paceline generate --strategy`"
        )
    return found
