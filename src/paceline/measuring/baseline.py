"""Plain decoding of every turn of every dialogue: what all other decoding is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from paceline.control.grammar import Grammar
from paceline.core import Output, Request
from paceline.decoding.governor import Budget, Fixed
from paceline.decoding.loop import Generation
from paceline.decoding.text_stream import text_of
from paceline.drafters.base import Drafter
from paceline.errors import RequestError
from paceline.lm import LM
from paceline.measuring.prompts import Dialogue
from paceline.registry import drafters
from paceline.watermarks.base import Watermark


@dataclass(frozen=True, slots=True)
class Asking:
    """How the turns are asked.

    Attributes:
        max_new_tokens: of each answer.
        temperature: 0 is greedy.
        seed: of the first turn; each next one has the next seed.
        chat: with the model's chat template; otherwise turns and answers are lines of one text.
        ignore_eos: go on past stop tokens, so that every answer has `max_new_tokens`.
        grammar: that answers follow.
        guide: steers every answer, as `LM.request` reads it.
        watermark: of every answer, if any.
        walk: of all but plain decoding, as `LM.request` reads it.
    """

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    chat: bool = False
    ignore_eos: bool = False
    grammar: Grammar | None = None
    guide: tuple[str, ...] = ()
    watermark: Watermark | None = None
    walk: str = "gumbel"


@dataclass(frozen=True, slots=True)
class BaselineTurn:
    """One prompt and its plain answer.

    Attributes:
        name: line and turn in the file.
        category: of the line.
        request: holds the earlier turns, their plain answers and this turn.
        plain: the answer, with margins.
        clipped: the prompt's beginning was cut off to make room for the answer.
    """

    name: str
    category: str
    request: Request
    plain: Output
    clipped: bool


def plain_drafter(lm: LM) -> Drafter:
    """The drafter that guesses nothing."""
    drafter: Drafter = drafters.parse("plain").build(lm.draft_target)
    return drafter


def plain_turns(lm: LM, dialogues: Sequence[Dialogue], asking: Asking) -> Iterator[BaselineTurn]:
    """Decode every turn plainly; a prompt too long for the context keeps its last tokens.

    Raises:
        RequestError: `max_new_tokens` leaves no room for a prompt.
    """
    context = lm.engine.config.context
    room = context - asking.max_new_tokens
    if asking.max_new_tokens < 1 or room < 1:
        raise RequestError(
            f"max_new_tokens is {asking.max_new_tokens}, expected 1 to {context - 1}: "
            f"the model sees {context} tokens, prompt included"
        )
    plain = plain_drafter(lm)
    seed = asking.seed
    for dialogue in dialogues:
        answers: list[str] = []
        for turn in range(len(dialogue.turns)):
            tokens = _encode(lm, dialogue.turns[: turn + 1], answers, asking.chat)
            request = lm.request(
                tokens[-room:],
                max_new_tokens=asking.max_new_tokens,
                temperature=asking.temperature,
                seed=seed,
                ignore_eos=asking.ignore_eos,
                grammar=asking.grammar,
                guide=asking.guide,
                watermark=asking.watermark,
            )
            output = decode(lm, plain, request, Fixed(0), margins=True)
            yield BaselineTurn(
                dialogue.name(turn), dialogue.category, request, output, len(tokens) > room
            )
            answers.append(output.text)
            seed += 1


def decode(
    lm: LM, drafter: Drafter, request: Request, budget: Budget, margins: bool = False
) -> Output:
    """One answer.

    Raises:
        KeyboardInterrupt: a generation that was interrupted is no measurement.
    """
    text = text_of(request, lm.tokenizer)
    output = Generation(lm.engine, drafter, request, budget, text, margins).run()
    if output.finish == "interrupted":
        raise KeyboardInterrupt
    return output


def _encode(lm: LM, said: Sequence[str], answers: Sequence[str], chat: bool) -> list[int]:
    if not chat:
        earlier = [part for pair in zip(said, answers, strict=False) for part in pair]
        return lm.tokenizer.encode("\n".join([*earlier, said[-1]]))
    messages = [{"role": "user", "content": said[0]}]
    for answer, turn in zip(answers, said[1:], strict=True):
        messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": turn})
    return lm.tokenizer.encode_chat(messages)
