"""What was said in a chat, and the prompt that it makes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paceline.errors import RequestError

if TYPE_CHECKING:
    from paceline.lm import LM, Prompt

USER = "{user}"
_CHARACTERS = 16  # of a token; more than any tokenizer has on average


@dataclass
class Transcript:
    """A conversation.

    Attributes:
        pattern: how a turn is written for a model without a chat template, with `{user}` in it;
            None: the model's template writes it.
        system: the system prompt, if there is one.
        turns: what the user said and what was answered, the oldest first.
    """

    pattern: str | None = None
    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)

    def prompt(self, said: str) -> Prompt:
        """Return the prompt for the answer to a message."""
        if self.pattern is not None:
            past = f"{self.system}\n" if self.system else ""
            for user, answer in self.turns:
                past += f"{self.pattern.replace(USER, user)} {answer}\n"
            return past + self.pattern.replace(USER, said)
        return [*self.messages(), {"role": "user", "content": said}]

    def messages(self) -> list[dict[str, str]]:
        """Return what was said as chat messages."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for user, answer in self.turns:
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": answer})
        return messages

    def fit(self, lm: LM, said: str, room: int) -> tuple[Prompt, int]:
        """Return the prompt for a message, and how many of the oldest turns were dropped for it.

        Args:
            lm: the model.
            said: the message.
            room: tokens of the answer; at most half of a small context is kept free for it.
        """
        context = lm.engine.config.context
        room = min(room, context // 2)
        dropped = self._drop_far(_CHARACTERS * context)
        while True:
            prompt = self.prompt(said)
            size = len(lm.request(prompt).prompt)
            if not self.turns or size + room <= context:
                return prompt, dropped
            self.turns.pop(0)
            dropped += 1

    def _drop_far(self, characters: int) -> int:
        """Drop the oldest turns that are farther back than so many characters; return how many.

        What cannot fit is not rendered: a file may hold any number of turns.
        """
        kept, size = 0, 0
        for user, answer in reversed(self.turns):
            size += len(user) + len(answer)
            if size > characters:
                break
            kept += 1
        dropped = len(self.turns) - kept
        del self.turns[:dropped]
        return dropped


def parse_pattern(template: str | None) -> str | None:
    r"""Return the pattern of `--template`, in which `\n` is a new line.

    Raises:
        RequestError: `{user}` is missing.
    """
    if template is None:
        return None
    pattern = template.replace("\\n", "\n")
    if USER not in pattern:
        raise RequestError(f"--template is {template!r}, expected {USER} in it")
    return pattern


def stop_strings(pattern: str | None) -> list[str]:
    """Return stop strings: a model that writes the user's next line has ended its turn."""
    start = pattern.partition(USER)[0].strip() if pattern else ""
    return [f"\n{start}"] if start else []
