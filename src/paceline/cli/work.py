"""What `prove` and `bench` share: a model, prompts and drafters before; a document after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.cli.output import check_target, document, save, say

if TYPE_CHECKING:
    from paceline.drafters.base import DraftMethod
    from paceline.lm import LM
    from paceline.measuring.prompts import Dialogue


@dataclass(frozen=True)
class Work:
    """What is measured.

    Attributes:
        lm: engine and tokenizer.
        dialogues: lines of the prompt file.
        turns: prompts in them.
        methods: drafters by name.
        left_out: drafters of `all` that need something that was not given.
    """

    lm: LM
    dialogues: list[Dialogue]
    turns: int
    methods: dict[str, DraftMethod]
    left_out: list[str]

    def tell(self, clipped: int, of: int) -> None:
        """Say what was left out and clipped."""
        for name in self.left_out:
            say(f"left out {name}: it needs something; name it with its settings")
        if clipped:
            say(f"{clipped} of {of} prompts were clipped to fit the context")


def prepare(
    model: str,
    prompts: Path,
    drafters: list[str],
    limit: int | None,
    engine: options.EngineChoice,
    out: Path | None,
    suite: str | None = None,
    tasks: Sequence[str] = (),
) -> Work:
    """Read everything that is needed; what cannot work is refused here, before the long part."""
    check_target(out)
    from paceline.measuring.suites import read_tasks

    dialogues = read_tasks(prompts, limit, suite, tasks)
    methods, left_out = options.find_drafters(drafters)
    lm = engine.open(model)
    turns = sum(len(dialogue.turns) for dialogue in dialogues)
    return Work(lm, dialogues, turns, methods, left_out)


def deliver(found: dict[str, Any], out: Path | None, json: bool) -> None:
    """Write the document where it is wanted."""
    if out:
        save(out, found)
    if json:
        document(found)
