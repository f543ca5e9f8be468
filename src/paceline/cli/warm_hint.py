"""A hint for a chat model without a warm start: what `paceline warm` is for, told once."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.cli.output import say

if TYPE_CHECKING:
    from paceline.lm import LM


def hint_warm_start(lm: LM, model: str | None, folder: Path | None = None) -> None:
    """Say once for each model how its drafters get a warm start, where they would use one.

    Args:
        lm: the model.
        model: as it was named; None is the default.
        folder: where it is noted that the hint was given; None takes the cache folder.
    """
    if not getattr(lm.drafter_method, "warm", False) or lm.draft_target.model is None:
        return
    if lm.draft_target.trace is not None or lm.tokenizer.template is None:
        return
    from paceline.cache_dir import cache_folder

    noted = (folder or cache_folder()) / f"warm-hint-{lm.model.fingerprint()}"
    try:
        noted.parent.mkdir(parents=True, exist_ok=True)
        noted.touch(exist_ok=False)
    except OSError:  # it was given, or it cannot be noted and would come every time
        return
    named = "" if model is None else f" --model {shlex.quote(model)}"
    say(
        f"drafts gain more from the first answer on with a warm start: paceline warm{named} makes "
        "one, once, from answers that this model writes itself; outputs stay the same"
    )
