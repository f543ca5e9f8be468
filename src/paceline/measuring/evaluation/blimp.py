"""BLiMP: is the grammatical sentence of a minimal pair the more probable one?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paceline.errors import RequestError
from paceline.lm import LM
from paceline.measuring.evaluation.base import Item, Kind, Metric, Result, Suite, item_key
from paceline.measuring.evaluation.data import find_files, is_text, read_rows
from paceline.measuring.evaluation.forest import Branches, score_branches
from paceline.measuring.evaluation.prefix import prefix_name, prefix_tokens


class Blimp(Suite):
    """Minimal pairs of 67 paradigms. Warstadt et al., arXiv 1912.00582.

    A pair is right if the grammatical sentence has the larger log-probability, summed over its
    tokens. Without a prefix token the first token of a sentence is not scored: it has nothing
    before it.

    Args:
        folder: holds JSON lines with `sentence_good`, `sentence_bad` and `UID`.
        limit: only the first pairs of each paradigm.
        prefix: see `prefix_tokens`.

    Raises:
        RequestError: the data cannot be read.
    """

    name = "blimp"
    metrics = (
        Metric("accuracy", Kind.SHARE, "correct"),
        Metric("difference in nats", Kind.MEAN, "nats"),
    )
    batch = 32

    def __init__(self, folder: Path, limit: int | None = None, prefix: str = "auto") -> None:
        self._prefix = prefix
        self.items = _read(folder, limit)

    def settings(self, lm: LM) -> dict[str, Any]:
        """Return the prefix token."""
        return {"prefix": prefix_name(lm, self._prefix)}

    def score(self, lm: LM, items: Sequence[Item]) -> list[Result]:
        """Return for each pair whether it is right and the difference of log-probabilities."""
        prefix = prefix_tokens(lm, self._prefix)
        encode = lm.tokenizer.encode
        groups: list[Branches] = []
        places: list[list[tuple[int, int]]] = []  # of each sentence: group and continuation
        for item in items:
            pair = [[*prefix, *encode(text, False)] for text in item.content]
            added = _branches(pair)
            places.append(
                [(len(groups), 0), (len(groups), 1)]
                if len(added) == 1
                else [(len(groups), 0), (len(groups) + 1, 0)]
            )
            groups += added
        scores = score_branches(lm.engine, groups)
        results = []
        for place in places:
            good, bad = (scores[group][index].logprob for group, index in place)
            results.append({"correct": int(good > bad), "nats": good - bad})
        return results


def _branches(pair: Sequence[list[int]]) -> list[Branches]:
    """Return two sentences as one tree; as two where they do not begin with the same token."""
    one, other = pair
    size = min(len(one), len(other))
    shared = next((i for i in range(size) if one[i] != other[i]), size)
    if shared:
        return [Branches(one[:shared], [one[shared:], other[shared:]])]
    return [Branches(each[:1], [each[1:]]) for each in pair]


def _read(folder: Path, limit: int | None) -> list[Item]:
    fields = {"sentence_good": is_text, "sentence_bad": is_text, "UID": is_text}
    counts: Counter[str] = Counter()
    items = []
    for path in find_files(folder, "blimp", ("blimp*.jsonl", "*.jsonl")):
        for row in read_rows(path, fields):
            group = row["UID"]
            counts[group] += 1
            if limit is None or counts[group] <= limit:
                pair = (row["sentence_good"], row["sentence_bad"])
                items.append(Item(pair, item_key(group, *pair), group))
    if not items:
        raise RequestError(f"{folder} holds no pair of BLiMP")
    return items
