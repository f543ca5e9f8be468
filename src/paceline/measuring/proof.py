"""Proof that a drafter changes nothing: every output against plain decoding, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from paceline.core import Output
from paceline.decoding.governor import Budget
from paceline.drafters.base import Drafter, DraftMethod
from paceline.drafters.learnt import read_learnt, write_learnt
from paceline.engines.base import Engine
from paceline.lm import LM
from paceline.measuring.prompts import Dialogue
from paceline.measuring.turns import Asking, Turn, decode, plain_turns


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where an output leaves plain decoding.

    Attributes:
        position: index among the new tokens.
        expected: plain decoding's token there; None where its output has ended.
        found: the other token there; None where that output has ended.
        margin: distance of the two best scores of the plain draw, in units of its scores (logits
            over temperature, plus noise); None where plain decoding drew nothing.
        tolerance: how far rounding may move that distance; 0 on a batch-invariant engine.
        verdict: `tie` when the margin is within the tolerance, otherwise `bug`.
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


def compare(plain: Output, other: Output, engine: Engine, temperature: float) -> Difference | None:
    """The first difference, or None; `plain` was decoded with margins."""
    position = 0
    for expected, found in zip(plain.tokens, other.tokens, strict=False):
        if expected != found:
            break
        position += 1
    ends = [out.tokens[position] if position < len(out.tokens) else None for out in (plain, other)]
    if ends == [None, None] and plain.finish == other.finish:
        return None
    tolerance = 0.0 if engine.invariant else engine.tolerance / (temperature or 1.0)
    margin = plain.margins[position] if ends[0] is not None else None
    # An output that ends elsewhere after the same tokens is never a matter of rounding.
    rounding = not engine.invariant and ends[1] is not None
    tie = rounding and margin is not None and margin <= tolerance
    return Difference(position, ends[0], ends[1], margin, tolerance, "tie" if tie else "bug")


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference and where it was found."""

    drafter: str
    prompt: str
    temperature: float
    difference: Difference

    def __str__(self) -> str:
        at = f"temperature {self.temperature:g}, {self.prompt}"
        return f"{self.drafter} at {at}, {self.difference}"


@dataclass(slots=True)
class Tally:
    """What was found out about one drafter: of `pairs` outputs, how many equal the plain ones."""

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
        drafters: by the text that named them.
        prompts: turns that were decoded, once for each temperature.
        clipped: how many of them lost their beginning to fit the context.
        findings: all differences, in the order in which they were found.
    """

    drafters: dict[str, Tally]
    prompts: int = 0
    clipped: int = 0
    findings: list[Finding] = field(default_factory=list)

    def total(self, what: str) -> int:
        """Sum of a field of `Tally` over the drafters."""
        return sum(getattr(tally, what) for tally in self.drafters.values())

    @property
    def first(self) -> Finding | None:
        """The first bug, or else the first tie."""
        bugs = [found for found in self.findings if found.difference.verdict == "bug"]
        return next(iter(bugs or self.findings), None)


def prove(
    lm: LM,
    methods: Mapping[str, DraftMethod],
    dialogues: Sequence[Dialogue],
    temperatures: Sequence[float],
    asking: Asking,
    budget: Callable[[], Budget],
    progress: Callable[[], None] = lambda: None,
    reload: bool = False,
) -> Proof:
    """Decode every turn at every temperature plainly and with every drafter.

    A drafter keeps what it learnt from prompt to prompt and from temperature to temperature: a
    full and stale memory is the harder case.

    Args:
        lm: gives engine and tokenizer.
        methods: drafters by name.
        dialogues: the prompts.
        temperatures: replace that of `asking` one after the other.
        asking: how the turns are asked.
        budget: makes what sizes the trees, once for each drafter.
        progress: called after each turn.
        reload: what each drafter learnt goes through a file between prompts, into a new drafter.
    """
    built = {name: (method.build(lm.target), budget()) for name, method in methods.items()}
    proof = Proof({name: Tally() for name in methods})
    for temperature in temperatures:
        for turn in plain_turns(lm, dialogues, replace(asking, temperature=temperature)):
            proof.prompts += 1
            proof.clipped += turn.clipped
            for name, (drafter, sizes) in built.items():
                output = decode(lm, drafter, turn.request, sizes)
                _count(proof, lm.engine, name, turn, output)
                if reload:
                    built[name] = (_reloaded(methods[name], lm, drafter), sizes)
            progress()
    return proof


def _reloaded(method: DraftMethod, lm: LM, drafter: Drafter) -> Drafter:
    state = drafter.state()
    if not state:
        return drafter
    with TemporaryDirectory() as folder:
        path = Path(folder) / "learnt.safetensors"
        write_learnt(path, state)
        fresh = method.build(lm.target)
        fresh.load(read_learnt(path))
    return fresh


def _count(proof: Proof, engine: Engine, name: str, turn: Turn, output: Output) -> None:
    temperature = turn.request.temperature
    difference = compare(turn.plain, output, engine, temperature)
    tally = proof.drafters[name]
    tally.pairs += 1
    tally.tokens += len(output.tokens)
    tally.passes += output.passes
    if difference is None:
        tally.identical += 1
        return
    tally.ties += difference.verdict == "tie"
    tally.bugs += difference.verdict == "bug"
    proof.findings.append(Finding(name, turn.name, temperature, difference))
