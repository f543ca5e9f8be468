"""Computes the caches of a lost node again, on its replacement, from the inputs that were kept."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from paceline.core import Floats, Tokens
from paceline.engines.pages import PAGE
from paceline.engines.pipeline.sequence import PipelineSequence
from paceline.engines.pipeline.stage import Stage, StageEntry

CHUNK = 256  # positions of a pass


def rebuild(stage: Stage, index: int, sequences: Sequence[PipelineSequence]) -> None:
    """Bring an empty stage to where the sequences are; pages that they shared are shared again.

    Passes that are not committed yet, but have left this stage behind, are run there again, too.

    Args:
        stage: the replacement.
        index: its place; the first one was given tokens, others hidden states.
        sequences: all that are open.

    Raises:
        StageLostError: the replacement was lost, too.
        PacelineError: its engine cannot run the inputs.
    """
    runs: list[Future[Floats]] = []
    ready: list[tuple[int, Tokens]] = []  # key and tokens of those before
    for own in sorted(sequences, key=lambda each: (len(each.tokens), each.key)):
        tokens = own.tokens.rows()
        key, start = _longest_prefix(tokens, ready)
        if key is None:
            stage.change("open", own.key)
        else:
            stage.change("fork", key, own.key)
            stage.change("truncate", own.key, start)
        states = own.states[index - 1].rows() if index else None
        for first in range(start, len(tokens), CHUNK):
            part = slice(first, first + CHUNK)
            count = len(tokens[part])
            parents = np.arange(-1, count - 1, dtype=np.int32)
            entry = StageEntry(own.key, tokens[part], parents)
            given = None if states is None else states[part]
            runs.append(stage.run([entry], given, answer=False))
            stage.change("commit", own.key, *range(count))
        if own.pending is not None:
            entry, inputs = own.pending
            runs.append(stage.run([entry], inputs[index - 1] if index else None, answer=False))
        ready.append((own.key, tokens))
    for run in runs:
        run.result()


def _longest_prefix(tokens: Tokens, ready: list[tuple[int, Tokens]]) -> tuple[int | None, int]:
    """Return the sequence that begins most like `tokens`, and in how many positions.

    They are whole pages, which every cache can be cut to; None and 0 if there are none.
    """
    found: tuple[int | None, int] = (None, 0)
    for key, other in ready:
        size = min(len(tokens), len(other))
        differing = np.flatnonzero(tokens[:size] != other[:size])
        common = int(differing[0]) if len(differing) else size
        if (common := common // PAGE * PAGE) > found[1]:
            found = key, common
    return found
