"""LAMBADA: how probable is the last word of a passage?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from paceline.errors import RequestError
from paceline.lm import LM
from paceline.measuring.evaluation.base import Item, Kind, Metric, Result, Suite, item_key
from paceline.measuring.evaluation.data import find_file, is_text, read_rows
from paceline.measuring.evaluation.forest import Branches, score_branches
from paceline.measuring.evaluation.prefix import prefix_name, prefix_tokens


class Lambada(Suite):
    """Last words of passages. Paperno et al., arXiv 1606.06031.

    The passage is split at its last space, as by lm-evaluation-harness; the space belongs to the
    word. Greedy accuracy counts words of which each token is the most probable one. Passages that
    are longer than the model's context are cut on the left.

    Args:
        folder: holds JSON lines with `text`.
        limit: only the first passages.
        prefix: see `prefix_tokens`.

    Raises:
        RequestError: the data cannot be read.
    """

    name = "lambada"
    metrics = (
        Metric("nats of the last word", Kind.MEAN, "nats"),
        Metric("accuracy", Kind.SHARE, "correct"),
    )

    def __init__(self, folder: Path, limit: int | None = None, prefix: str = "auto") -> None:
        self._prefix = prefix
        path = find_file(folder, "lambada", "lambada*test*.jsonl", "lambada*.jsonl", "*.jsonl")
        rows = read_rows(path, {"text": _has_last_word})
        self.items = [
            Item(row["text"].strip(), item_key(row["text"])) for row in islice(rows, limit)
        ]
        if not self.items:
            raise RequestError(f"{path} holds no passage")

    def settings(self, lm: LM) -> dict[str, Any]:
        """Return the prefix token."""
        return {"prefix": prefix_name(lm, self._prefix)}

    def score(self, lm: LM, items: Sequence[Item]) -> list[Result]:
        """Return for each passage the nats of its last word, and whether it is the greedy one."""
        prefix = prefix_tokens(lm, self._prefix)
        context = lm.engine.config.context
        groups = []
        for item in items:
            before, after = split_last_word(lm, item.content)
            room = context + 1 - len(prefix) - len(after)
            if room < 1:
                raise RequestError(f"a last word has {len(after)} tokens, too many for the model")
            groups.append(Branches([*prefix, *before[-room:]], [after]))
        scores = score_branches(lm.engine, groups)
        return [{"nats": -each.logprob, "correct": int(each.greedy)} for [each] in scores]


def split_last_word(lm: LM, text: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a text before its last word, and those of the word.

    The whole text is encoded, so that tokens are those of the text; where a token crosses the
    border, the word begins with it.

    Raises:
        RequestError: the text is a single token.
    """
    encode = lm.tokenizer.encode
    before, whole = encode(text.rpartition(" ")[0], False), encode(text, False)
    size = min(len(before), len(whole) - 1)
    shared = next((i for i in range(size) if before[i] != whole[i]), size)
    if len(whole) < 2:
        raise RequestError(f"the passage {text!a:.60} is a single token; it has no last word")
    shared = max(shared, 1)
    return whole[:shared], whole[shared:]


def _has_last_word(value: object) -> bool:
    return is_text(value) and " " in str(value).strip()
