"""Proof that drafting changes nothing: every output against plain decoding, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from paceline.core import Floats, Output, Request
from paceline.decoding.governor import Budget, Fixed
from paceline.drafters.base import Drafter, DraftMethod
from paceline.drafters.history.state_file import read_learnt, write_learnt
from paceline.lm import LM
from paceline.measuring.baseline import (
    BaselineTurn,
    TurnOptions,
    decode,
    plain_drafter,
    plain_turns,
)
from paceline.measuring.prompts import Dialogue


@dataclass(frozen=True, slots=True)
class Difference:
    """The first position at which an output differs from plain decoding.

    Attributes:
        position: index among the new tokens.
        expected: plain decoding's token there; None if its output has ended.
        found: the other token there; None if that output has ended.
        margin: difference of the two best scores of the plain draw (logits over temperature, plus
            noise); None if plain decoding drew nothing.
        tolerance: how far rounding may move that difference; 0 on a batch-invariant engine.
        verdict: `tie` if rounding within the tolerance explains it, otherwise `bug`.
    """

    position: int
    expected: int | None
    found: int | None
    margin: float | None
    tolerance: float
    verdict: str

    def __str__(self) -> str:
        margin = "none" if self.margin is None else f"{self.margin:.3g}"
        return (
            f"new token {self.position}: plain has {_shown(self.expected)}, this has "
            f"{_shown(self.found)}; margin {margin}, tolerance {self.tolerance:.3g}: {self.verdict}"
        )


def _shown(token: int | None) -> str:
    return "ended" if token is None else f"token {token}"


@dataclass(frozen=True, slots=True)
class _Moved:
    """Moves one logit at one position, before all controls."""

    position: int  # tokens before it
    token: int
    by: float

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        if len(history) == self.position:
            logits = logits.copy()
            logits[self.token] += self.by
        return logits


def compare(lm: LM, request: Request, plain: Output, other: Output) -> Difference | None:
    """Return the first difference, or None; `plain` was decoded with margins.

    Where rounding is allowed, a difference is a tie if the two best scores are within the
    tolerance, or if plain decoding itself goes the other way once one of the two logits is moved by
    the tolerance: near the edge of a truncation (top-k, top-p, ...) a token may drop out that was
    far ahead.
    """
    position = 0
    for one, another in zip(plain.tokens, other.tokens, strict=False):
        if one != another:
            break
        position += 1
    ends = [out.tokens[position] if position < len(out.tokens) else None for out in (plain, other)]
    if ends == [None, None] and plain.finish == other.finish:
        return None
    expected, found = ends
    margin = plain.margins[position] if expected is not None else None
    tolerance, tie = 0.0, False
    if not lm.engine.invariant:
        tolerance = lm.engine.tolerance / (request.temperature or 1.0)
        # An output that ends elsewhere after the same tokens is never a matter of rounding.
        if margin is not None and expected is not None and found is not None:
            moves = ((found, lm.engine.tolerance), (expected, -lm.engine.tolerance))
            tie = margin <= tolerance or any(
                _moved(lm, request, position, token, by) == found for token, by in moves
            )
    return Difference(position, expected, found, margin, tolerance, "tie" if tie else "bug")


def _moved(lm: LM, request: Request, position: int, token: int, by: float) -> int | None:
    """Return plain decoding's token at `position` once the logit of `token` is moved there."""
    move = _Moved(len(request.prompt) + position, token, by)
    again = replace(request, controls=(move, *request.controls), max_new_tokens=position + 1)
    tokens = decode(lm, plain_drafter(lm), again, Fixed(0)).tokens
    return tokens[position] if position < len(tokens) else None


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference, and the drafter, prompt and temperature at which it occurred."""

    drafter: str
    prompt: str
    temperature: float
    difference: Difference

    def __str__(self) -> str:
        at = f"temperature {self.temperature:g}, {self.prompt}"
        return f"{self.drafter} at {at}, {self.difference}"


@dataclass(slots=True)
class Tally:
    """Counts of one drafter: of `pairs` outputs, how many equal the plain ones."""

    pairs: int = 0
    identical: int = 0
    ties: int = 0
    bugs: int = 0
    tokens: int = 0
    passes: int = 0


@dataclass(slots=True)
class Proof:
    """The result of `prove`.

    Attributes:
        drafters: tallies by the text that named the drafter.
        prompts: turns that were decoded, once for each temperature.
        clipped: how many of them lost their beginning to fit the context.
        findings: all differences, in the order in which they occurred.
    """

    drafters: dict[str, Tally]
    prompts: int = 0
    clipped: int = 0
    findings: list[Finding] = field(default_factory=list)

    def total(self, what: str) -> int:
        """Return the sum of a field of `Tally` over the drafters."""
        return sum(getattr(tally, what) for tally in self.drafters.values())

    @property
    def first(self) -> Finding | None:
        """The first bug, or else the first tie."""
        bugs = [each for each in self.findings if each.difference.verdict == "bug"]
        return next(iter(bugs or self.findings), None)


def prove(
    lm: LM,
    methods: Mapping[str, DraftMethod],
    dialogues: Sequence[Dialogue],
    temperatures: Sequence[float],
    options: TurnOptions,
    budget: Callable[[], Budget],
    progress: Callable[[], None] = lambda: None,
    reload: bool = False,
) -> Proof:
    """Decode every turn at every temperature plainly and with every drafter.

    A drafter keeps what it learns from prompt to prompt and from temperature to temperature: a
    full and stale memory is the harder case.

    Args:
        lm: gives engine and tokenizer.
        methods: drafters by name.
        dialogues: the prompts.
        temperatures: replace that of `options` one after the other.
        options: of every turn.
        budget: makes what sizes the trees, once for each drafter.
        progress: called after each output, the plain one and that of each drafter.
        reload: pass what each drafter has learnt through a file into a new drafter between prompts.
    """
    built = {name: (method.build(lm.draft_target), budget()) for name, method in methods.items()}
    proof = Proof({name: Tally() for name in methods})
    for temperature in temperatures:
        for turn in plain_turns(lm, dialogues, replace(options, temperature=temperature)):
            proof.prompts += 1
            proof.clipped += turn.clipped
            progress()
            for name, (drafter, sizes) in built.items():
                output = decode(lm, drafter, turn.request, sizes)
                _count(proof, lm, name, turn, output)
                progress()
                if reload:
                    built[name] = (_reloaded(methods[name], lm, drafter), sizes)
    return proof


def _reloaded(method: DraftMethod, lm: LM, drafter: Drafter) -> Drafter:
    state = drafter.state()
    if not state:
        return drafter
    with TemporaryDirectory() as folder:
        path = Path(folder) / "learnt.safetensors"
        write_learnt(path, state)
        fresh = method.build(lm.draft_target)
        fresh.load(read_learnt(path))
    return fresh


def _count(proof: Proof, lm: LM, name: str, turn: BaselineTurn, output: Output) -> None:
    difference = compare(lm, turn.request, turn.plain, output)
    tally = proof.drafters[name]
    tally.pairs += 1
    tally.tokens += len(output.tokens)
    tally.passes += output.passes
    if difference is None:
        tally.identical += 1
        return
    tally.ties += difference.verdict == "tie"
    tally.bugs += difference.verdict == "bug"
    proof.findings.append(Finding(name, turn.name, turn.request.temperature, difference))
