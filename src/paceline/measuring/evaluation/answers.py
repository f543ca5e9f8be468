"""Greedy answers to the questions of a suite, several at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from paceline.core import Output
from paceline.errors import RequestError
from paceline.lm import LM

Message = dict[str, Any]


def check_prompts(
    lm: LM, suite: str, prompts: Sequence[str | list[Message]], max_new_tokens: int
) -> None:
    """Refuse prompts that leave no room for an answer.

    Raises:
        RequestError: says what to change; or the model has no chat template.
    """
    context = lm.engine.config.context
    for prompt in prompts:
        if isinstance(prompt, str):
            size = len(lm.encode(prompt))
        else:
            size = len(lm.tokenizer.encode_chat(prompt))
        if size + max_new_tokens > context:
            raise RequestError(
                f"a prompt of {suite} has {size} tokens and an answer up to {max_new_tokens}, but "
                f"the model sees {context}; give fewer --shots or --max-new-tokens"
            )


def write_answers(
    lm: LM, prompts: Sequence[str | list[Message]], max_new_tokens: int, stops: Sequence[str]
) -> list[str]:
    """Return the greedy answer to each prompt, a text or a conversation.

    Raises:
        RequestError, MethodError: a prompt cannot be answered.
    """
    listed: Any = list(prompts)
    outputs = cast(
        "list[Output]",
        lm.generate(listed, max_new_tokens=max_new_tokens, temperature=0.0, stop=list(stops)),
    )
    if any(output.finish not in ("stop", "length") for output in outputs):
        raise KeyboardInterrupt  # part of an answer is none
    return [output.text for output in outputs]
