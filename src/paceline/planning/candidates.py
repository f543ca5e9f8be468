"""Which setups a plan considers, and the bounds that leave some out before anything runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from paceline import registry
from paceline.abilities import Ability
from paceline.core import Exactness
from paceline.engines.formats import BITS, FORMATS
from paceline.engines.kv_formats import GROUPED_KV, NO_GROUPED_KV
from paceline.engines.native import KV_FORMATS, NativeEngine
from paceline.engines.pages import PAGE
from paceline.errors import MethodError, ModelError
from paceline.kvcache.base import parse_policy
from paceline.models import Model
from paceline.models.local_models import list_models
from paceline.models.tokenizer import same_tokens
from paceline.planning.cost_model import estimated_bytes
from paceline.planning.setups import CacheForm, Goal

STORED = "auto"
# Measured first; others follow while there is time.
_FIRST_FORMATS = ("int8", "int4", "auto:act=int8", "int8:act=int8", "int4:act=int8")
_FIRST_DRAFTERS = ("blend", "token_recycling", "recycle", "suffix", "lookup")
MIN_CACHED = 1024  # positions from which bounded and few-read caches are considered
_SMALLER = 0.98  # of the stored bytes, below which a format is worth its rounding
_ONLY_WITH_MORE = ("predicted_output", "forced")  # draft nothing without a prediction or controls
_SUFFIX = re.compile(r"[-_.]?(i?q\d\w*|[bf]p?f?\d+|int\d|gguf|awq|gptq|w\d+a\d+)$", re.I)


@dataclass(frozen=True)
class WeightCandidate:
    """A checkpoint in a format.

    Attributes:
        path: of the checkpoint.
        format: of the weights; `auto` is as stored.
        bytes: estimate of its size.
        exact: it is the planned model as it is stored.
    """

    path: str
    format: str
    bytes: int
    exact: bool = False

    @property
    def name(self) -> str:
        """Return it in words."""
        return self.format if self.exact else f"{self.path} {self.format}"


def weight_candidates(
    model: str, stored_bytes: int, parameters: int, others: dict[str, int], exact: bool
) -> list[WeightCandidate]:
    """Return the checkpoints and formats, the most promising first.

    Args:
        model: that is planned for.
        stored_bytes: of its matrices.
        parameters: number of its weights.
        others: bytes of other checkpoints of the same base, by path.
        exact: only the model as it is stored.
    """
    found = [WeightCandidate(model, STORED, stored_bytes, True)]
    if exact:
        return found
    found += [WeightCandidate(path, STORED, size) for path, size in others.items()]
    names = [*_FIRST_FORMATS, *(name for name in FORMATS if name not in _FIRST_FORMATS)]
    for name in names:
        layers = name.partition(":")[0]
        size = stored_bytes if layers == STORED else estimated_bytes(parameters, BITS[layers])
        found.append(WeightCandidate(model, name, size))
    return found


def out_of_bounds(
    candidate: WeightCandidate, stored_bytes: int, page_bytes: dict[str, int], goal: Goal
) -> str | None:
    """Return why a candidate cannot be chosen whatever is measured; None if it can.

    Args:
        candidate: a checkpoint in a format.
        stored_bytes: of the model's matrices as they are stored.
        page_bytes: of a page of keys and values, by format.
        goal: with its memory, context and users.
    """
    rounded = not candidate.format.startswith(STORED)
    if rounded and candidate.bytes >= _SMALLER * stored_bytes:
        return "not smaller than what is stored, and no more exact"
    if goal.memory is None:
        return None
    smallest = min(page_bytes.values()) if not goal.exact else page_bytes["fp32"]
    rows = goal.context or 1
    least = round(0.9 * candidate.bytes)  # estimates may be a little high
    if not policies(goal, rows):
        least += goal.users * -(-rows // PAGE) * smallest
    if least > goal.memory:
        return f"needs {least / 1e6:.0f} MB at least"
    return None


def drafter_candidates(named: Sequence[str]) -> list[str]:
    """Return the drafters that need nothing else, and those that the user names."""
    exact = [
        name
        for name, method in registry.drafters.visible().items()
        if method.exactness is Exactness.EXACT
        and not method.needs
        and not registry.required(method)
        and name not in ("plain", *_ONLY_WITH_MORE)
    ]
    first = [name for name in _FIRST_DRAFTERS if name in exact]
    return list(dict.fromkeys([*named, *first, *exact]))


def kv_candidates(goal: Goal) -> list[str]:
    """Return the formats of cached keys and values."""
    return ["auto"] if goal.exact else ["auto", *(name for name in KV_FORMATS if name != "fp32")]


def policies(goal: Goal, context: int) -> list[str]:
    """Return KV policies that keep a half and a quarter of the context."""
    if goal.exact or context < MIN_CACHED:
        return []
    found = []
    for name, method in sorted(registry.kv_policies.visible().items()):
        if name == "random" or registry.required(method):
            continue
        for share in (2, 4):
            text = f"{name}:budget={context // share}"
            if "recent" in method.__dataclass_fields__:
                text += f",recent={context // share // 2}"
            with suppress(MethodError):  # another setting does not go with so small a budget
                if not parse_policy(text).required - NativeEngine.abilities:
                    found.append(text)
    return found


def attentions(goal: Goal, cached: float) -> list[str]:
    """Return attention patterns that read a quarter and a tenth of so many cached positions."""
    if goal.exact or cached < MIN_CACHED:
        return []
    names = [name for name in sorted(registry.patterns.visible()) if _reads_few(name)]
    return [f"{name}:share={share}" for name in names for share in (0.25, 0.1)]


def _reads_few(name: str) -> bool:
    """Return whether a pattern reads few positions while decoding, in the native engine."""
    method = registry.patterns.visible()[name]
    rule = None if registry.required(method) else method().few_read
    return rule is not None


def goes_together(cache: CacheForm) -> bool:
    """Return whether the native engine runs a KV policy or a pattern on a cache of a format."""
    if cache.kv_format not in GROUPED_KV:
        return True
    if cache.attention is not None:
        return False
    return cache.policy is None or not parse_policy(cache.policy).required & NO_GROUPED_KV


def left_out() -> dict[str, str]:
    """Return what is considered for no setup, with the reason."""
    found = {
        f"attention pattern {name}": "it does not make decoding faster in the native engine"
        for name in registry.patterns.visible()
        if not _reads_few(name)
    }
    for name, method in registry.drafters.visible().items():
        if method.exactness is not Exactness.EXACT:
            found[f"drafter {name}"] = "it may change the output"
        elif registry.required(method):
            found[f"drafter {name}"] = "it needs a model or a file: name it with --drafter"
        elif method.needs - {Ability.LAYERS, Ability.POSITIONS}:
            found[f"drafter {name}"] = "name it with --drafter"
    return found


def thread_candidates(default: int, usable: int) -> list[int]:
    """Return numbers of threads beside the default one."""
    return sorted({max(1, default // 2), usable} - {default})


def checkpoints_here(model: Model, path: str) -> Iterator[str]:
    """Yield checkpoints on this machine that are the same base by name, shape and tokens."""
    own = _base_name(path)
    for listed in list_models():
        if not listed.here or listed.path is None or _base_name(listed.name) != own:
            continue
        try:
            from paceline.models import load

            other = load(listed.path)
            if other.path == model.path or not _same_shape(model, other):
                continue
            if same_tokens(model.tokenizer, other.tokenizer):
                yield listed.path
        except ModelError:
            continue


def _base_name(name: str) -> str:
    """Return a model's name in lower case, without what says how it is stored."""
    base = name.rstrip("/").rpartition("/")[2].lower().removesuffix(".gguf")
    while (shorter := _SUFFIX.sub("", base)) != base:
        base = shorter
    return base


def _same_shape(model: Model, other: Model) -> bool:
    a, b = model.config, other.config
    return (a.vocab_size, a.hidden_size, len(a.layers)) == (
        b.vocab_size,
        b.hidden_size,
        len(b.layers),
    )
