"""Plain decoding of every turn of every dialogue: the baseline of benches and proofs."""

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
class TurnOptions:
    """Options with which every turn is decoded.

    Attributes:
        max_new_tokens: upper limit of each answer, in tokens.
        temperature: 0 is greedy.
        seed: of the first turn; every further turn has the next seed.
        chat: use the model's chat template; otherwise turns and answers are lines of one text.
        ignore_eos: keep generating after stop tokens, so that every answer has `max_new_tokens`.
        grammar: that answers follow.
        guide: guides of every answer, as `LM.request` takes them.
        watermark: of every answer, if any.
        walk: of all arms but plain decoding, as `LM.request` takes it.
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
    """One prompt and its answer by plain decoding.

    Attributes:
        name: line and turn in the file.
        category: of the line.
        request: holds the earlier turns, their plain answers and this turn.
        plain: the answer, with margins.
        clipped: whether the beginning of the prompt was cut off to make room for the answer.
    """

    name: str
    category: str
    request: Request
    plain: Output
    clipped: bool


def plain_drafter(lm: LM) -> Drafter:
    """Return the drafter that proposes nothing."""
    drafter: Drafter = drafters.parse("plain").build(lm.draft_target)
    return drafter


def plain_turns(
    lm: LM, dialogues: Sequence[Dialogue], options: TurnOptions
) -> Iterator[BaselineTurn]:
    """Decode every turn plainly; a prompt too long for the context keeps its last tokens.

    Raises:
        RequestError: `max_new_tokens` leaves no room for a prompt.
    """
    context = lm.engine.config.context
    room = context - options.max_new_tokens
    if options.max_new_tokens < 1 or room < 1:
        raise RequestError(
            f"max_new_tokens is {options.max_new_tokens}, expected 1 to {context - 1}: "
            f"the model sees {context} tokens, prompt included"
        )
    plain = plain_drafter(lm)
    seed = options.seed
    for dialogue in dialogues:
        answers: list[str] = []
        for turn in range(len(dialogue.turns)):
            tokens = _encode(lm, dialogue.turns[: turn + 1], answers, options.chat)
            request = lm.request(
                tokens[-room:],
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                seed=seed,
                ignore_eos=options.ignore_eos,
                grammar=options.grammar,
                guide=options.guide,
                watermark=options.watermark,
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
    """Decode one request.

    Raises:
        KeyboardInterrupt: it was interrupted; such an output is no measurement.
    """
    text = text_of(request, lm.tokenizer)
    output = Generation(lm.engine, drafter, request, budget, text, margins).run()
    if output.finish == "interrupted":
        raise KeyboardInterrupt
    return output


def _encode(lm: LM, turns: Sequence[str], answers: Sequence[str], chat: bool) -> list[int]:
    if not chat:
        earlier = [part for pair in zip(turns, answers, strict=False) for part in pair]
        return lm.tokenizer.encode("\n".join([*earlier, turns[-1]]))
    messages = [{"role": "user", "content": turns[0]}]
    for answer, turn in zip(answers, turns[1:], strict=True):
        messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": turn})
    return lm.tokenizer.encode_chat(messages)
