"""Which rule suits each head for reading a prompt: found once, kept in a file.

Based on the kernel-aware search of MInference (Jiang et al. 2024, section 3.2 and algorithm 1):
rules that read equally many positions are compared by the output of the head that they give.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paceline.core import Floats, Tokens
from paceline.engines.base import Engine
from paceline.engines.sparse_prefill import BLOCK, HeadRule, PrefillRule, SparsePrefill
from paceline.errors import MethodError, RequestError

Profile = tuple[tuple[HeadRule, ...], ...]  # [layer][query head]
_FORMAT = "paceline head profile 1"
_PROBES = 4  # blocks of queries of a text that are compared
_SHARES = (0.125, 0.25, 0.5, 0.75)  # of the budget, that single positions take


def candidates(budget: int) -> list[HeadRule]:
    """Return rules that read about `budget` positions besides those that are always read."""
    lines = [
        HeadRule(PrefillRule.VERTICAL_SLASH, columns, budget - columns)
        for columns in (round(share * budget) for share in _SHARES)
    ]
    blocks = max(1, budget // BLOCK)
    return [
        HeadRule(PrefillRule.A_SHAPE, budget),
        *lines,
        HeadRule(PrefillRule.MEAN_BLOCKS, blocks),
    ]


def find_profile(
    engine: Engine,
    text: Tokens,
    rule: SparsePrefill,
    rules: Sequence[HeadRule],
    tick: Callable[[int], None] = lambda _: None,
) -> Profile:
    """Return for each query head the rule whose output is nearest to full attention.

    The text is run in full. In each head the last whole block of queries of each quarter of its
    second half is then read by every rule; the rule with the smallest sum of squared differences
    wins, of equals the earlier.

    Args:
        engine: has the abilities `KEYS` and `QUERIES`, and no attention pattern.
        text: int32 [S]; its whole blocks count.
        rule: what all heads read, and how many queries of a block choose.
        rules: to choose from.
        tick: called with 1 behind each layer.

    Raises:
        RequestError: the text, or what the model sees, is too short for anything to be left out; or
            the text is too long.
    """
    size = len(text) // BLOCK * BLOCK
    least = (rule.sinks + rule.local + 1) * BLOCK
    if engine.config.context < least:
        raise RequestError(
            f"a profile needs a model that sees {least} tokens, found {engine.config.context}"
        )
    if not least <= size <= engine.config.context:
        raise RequestError(
            f"the text has {len(text)} tokens; a profile needs {least} to {engine.config.context}"
        )
    sequence = engine.open()
    try:
        engine.track_queries(sequence, size)
        engine.extend(sequence, text[:size])
        profile = []
        for index, layer in enumerate(engine.config.layers):
            if not layer.heads or layer.window is not None:  # read in full anyway
                profile.append((rules[0],) * layer.heads)
                tick(1)
                continue
            queries = engine.recent_queries(sequence, index)
            keys, values = engine.keys_values(sequence, index)
            heads = []
            for head in range(layer.heads):
                group = head // (layer.heads // layer.kv_heads)
                rows = queries[head], keys[group], values[group]
                errors = _errors(rows, rule, rules, engine.config.attention_softcap)
                heads.append(rules[int(np.argmin(errors))])
            profile.append(tuple(heads))
            tick(1)
        return tuple(profile)
    finally:
        engine.release(sequence)


def _errors(
    rows: tuple[Floats, Floats, Floats],
    rule: SparsePrefill,
    rules: Sequence[HeadRule],
    softcap: float | None,
) -> list[float]:
    """Return the squared difference of each rule's output from that of full attention."""
    import torch

    from paceline.engines.choose_positions import choose_positions

    queries, keys, values = map(torch.from_numpy, rows)  # [S, D]
    count = len(queries) // BLOCK
    errors = [0.0] * len(rules)
    for own in sorted({count * (_PROBES + i + 1) // (2 * _PROBES) - 1 for i in range(_PROBES)}):
        if own + 1 <= rule.sinks + rule.local:
            continue
        asked, end = queries[own * BLOCK : (own + 1) * BLOCK], (own + 1) * BLOCK
        scores = asked @ keys[:end].T  # [64, end]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        seen = torch.ones(BLOCK, end, dtype=torch.bool).tril(own * BLOCK)
        scores = scores.masked_fill(~seen, -torch.inf)
        full = scores.softmax(-1) @ values[:end]
        for place, each in enumerate(rules):
            read = choose_positions(rule, each, asked, keys[:end], softcap)
            hidden = torch.cat([~read, torch.zeros(BLOCK, dtype=torch.bool)])
            found = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values[:end]
            errors[place] += float((found - full).double().square().sum())
    return errors


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile as JSON."""
    layers = [[[head.rule.name.lower(), head.first, head.second] for head in x] for x in profile]
    path.write_text(json.dumps({"format": _FORMAT, "layers": layers}) + "\n", encoding="utf-8")


def read_profile(path: str, method: str) -> Profile:
    """Return the profile that `write_profile` wrote.

    Raises:
        MethodError: the file cannot be read, or holds something else; `method` is named.
    """
    try:
        data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise ValueError
        return tuple(tuple(map(_read_head, layer)) for layer in data["layers"])
    except OSError as error:
        raise MethodError(f"{method}:profile {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise MethodError(
            f"{method}:profile {path} is no head profile; make one with `paceline profile-heads`"
        ) from None


def _read_head(entry: Any) -> HeadRule:
    name, first, second = entry
    rule = PrefillRule[str(name).upper()]
    sizes = all(type(size) is int and 0 <= size < 1 << 31 for size in (first, second))
    if rule == PrefillRule.MASS or not sizes:
        raise ValueError
    return HeadRule(rule, first, second)
