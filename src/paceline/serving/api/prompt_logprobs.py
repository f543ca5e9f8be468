"""The scores of prompts: taken from the choices that hold them, and in vLLM's format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from paceline.compatibility import Side, check
from paceline.serving.api.formatting import Choice
from paceline.serving.api.logprobs import TokenTexts
from paceline.serving.messages import Logprob
from paceline.serving.prompt_scores import PromptScores

if TYPE_CHECKING:
    from paceline.lm import LM


def check_whole() -> None:
    """Refuse the scores of a prompt in a stream.

    Raises:
        RequestError: always; both sides are named.
    """
    check({Side.PROMPT_SCORES: "the scores of a prompt", Side.STREAM: "stream"})


def with_prompt_scores(choices: Sequence[Choice]) -> list[Choice]:
    """Return the choices, with the scores of their prompts where these were asked for.

    The choice of a prompt that is only scored is the score itself.
    """
    kept = [choice for choice in choices if not _scores(choice)]
    scores = {_prompt_of(choice): choice for choice in choices if _scores(choice)}
    for choice in kept:
        if found := scores.get(_prompt_of(choice)):
            choice.prompt_logprobs = found.logprobs
    answered = {_prompt_of(choice) for choice in kept}
    for prompt, choice in scores.items():
        if prompt not in answered:
            choice.prompt_logprobs, choice.logprobs = choice.logprobs, []
            kept.append(choice)
    return kept


def with_fewer(logprobs: Sequence[Logprob], count: int) -> list[Logprob]:
    """Return log-probabilities with at most `count` likely tokens each."""
    return [each._replace(top=each.top[:count]) for each in logprobs]


def prompt_logprobs(
    logprobs: Sequence[Logprob], count: int, lm: LM
) -> list[dict[str, dict[str, Any]] | None]:
    """Return the log-probabilities of a prompt in vLLM's format.

    Args:
        logprobs: of each token of the prompt.
        count: how many likely tokens each entry has, besides the prompt's own.
        lm: knows the tokens.

    Returns:
        for each token its alternatives and itself, by token id; None for the first token.
    """
    texts = TokenTexts(lm, begins=True)
    entries: list[dict[str, dict[str, Any]] | None] = []
    for each in logprobs:
        likely = [(token, logprob, place) for place, (token, logprob) in enumerate(each.top, 1)]
        ranked = [(each.token, each.logprob, each.rank), *likely[:count]]
        entry = {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": texts.text(token)}
            for token, logprob, rank in ranked
        }
        entries.append(None if each.logprob is None else entry)
        texts.push(each.token)
    return entries


def _scores(choice: Choice) -> bool:
    return isinstance(choice.job.strategy, PromptScores)


def _prompt_of(choice: Choice) -> str:
    return choice.job.id.rpartition("-")[0]
