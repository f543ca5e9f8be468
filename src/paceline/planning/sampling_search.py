"""Sampling settings that pay: the best score within a budget of tokens, found within another.

After Wang et al., Cost-Effective Hyperparameter Optimization for Large Language Model Generation
Inference, arXiv 2303.04673 (EcoOptiGen; catalogue 275). A trial begins with few answers to few
examples and doubles both. It is given up as soon as its cost must exceed what an answer may cost,
or its score must stay behind the best; and settings that ask for no less than some that were too
dear are not tried at all. The paper proposes settings by BlendSearch; here half of them are drawn
at random and half near the best. A draw depends on nothing but the seed and its place, so that a
shorter answer is the beginning of a longer one, and none is decoded twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import log, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from paceline.decoding.text_stream import TextStream
from paceline.errors import RequestError
from paceline.models.detokenize import Detokenizer

if TYPE_CHECKING:
    from paceline.lm import LM

_TRIES = 64  # proposals for one trial before the search has come to its end
_DOUBT = 0.05  # chance at which a bound may be wrong


@dataclass(frozen=True, slots=True)
class Example:
    """A question, and what its answer is judged by."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Settings:
    """What is tuned.

    Attributes:
        temperature: 0 is greedy.
        top_p: of the nucleus; 1 keeps all. Tuned instead of the temperature, as in the paper.
        n: answers to a question, the best of which counts.
        max_new_tokens: of each.
    """

    temperature: float
    top_p: float
    n: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Space:
    """The limits of the settings; `tokens` and `n` are searched by their logarithms."""

    temperature: tuple[float, float] = (0.0, 1.5)
    top_p: tuple[float, float] = (0.1, 1.0)
    n: tuple[int, int] = (1, 16)
    tokens: tuple[int, int] = (16, 256)

    def __post_init__(self) -> None:
        for name, (low, high), least in (
            ("temperature", self.temperature, 0.0),
            ("top_p", self.top_p, 1e-6),
            ("n", self.n, 1),
            ("tokens", self.tokens, 1),
        ):
            if not least <= low <= high < float("inf") or (name == "top_p" and high > 1):
                raise RequestError(f"{name} is to be {low:g} to {high:g}; those are no limits")

    def cheapest(self) -> Settings:
        """Where the search begins."""
        return Settings(self.temperature[0], 1.0, self.n[0], self.tokens[0])

    def draw(self, rng: np.random.Generator) -> Settings:
        """Settings from anywhere."""
        heat, nucleus = 1.0, 1.0
        if rng.random() < 0.5:
            heat = float(rng.uniform(*self.temperature))
        else:
            nucleus = float(rng.uniform(*self.top_p))
            heat = float(np.clip(1.0, *self.temperature))
        n, tokens = (_whole(np.exp(rng.uniform(*np.log(ends))), ends) for ends in self._sizes())
        return self._settings(heat, nucleus, n, tokens)

    def near(self, best: Settings, rng: np.random.Generator) -> Settings:
        """Settings like the best."""
        heat, nucleus = best.temperature, best.top_p
        if nucleus < 1:
            nucleus = float(np.clip(nucleus + rng.normal(0, 0.1), *self.top_p))
        else:
            spread = 0.1 * (self.temperature[1] - self.temperature[0])
            heat = float(np.clip(heat + rng.normal(0, spread), *self.temperature))
        n, tokens = (
            _whole(size * 2 ** rng.uniform(-1, 1), ends)
            for size, ends in zip((best.n, best.max_new_tokens), self._sizes(), strict=True)
        )
        return self._settings(heat, nucleus, n, tokens)

    def _settings(self, heat: float, nucleus: float, n: int, tokens: int) -> Settings:
        """Rounded; greedy answers are all the same, so that one is enough."""
        heat = round(heat, 3)
        return Settings(heat, round(nucleus, 3), n if heat else self.n[0], tokens)

    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return self.n, self.tokens


def _whole(size: float, ends: tuple[int, int]) -> int:
    return int(np.clip(round(float(size)), *ends))


class Writer(Protocol):
    """Answers questions."""

    def __call__(self, prompt: str, settings: Settings, seed: int) -> list[int]:
        """The tokens of one answer; a shorter `max_new_tokens` gives its beginning."""
        ...


@dataclass(slots=True)
class Trial:
    """Settings that were tried.

    Attributes:
        verdict: `whole` (all examples), `dear` (an answer costs too much), `behind` (the score
            stays behind the best) or `unfinished` (the tuning budget was spent).
        score: mean of the examples that were looked at.
        cost: their mean new tokens, of all n answers.
        n: answers for which score and cost were taken; less than asked for if it was given up.
        examples: how many were looked at.
        spent: new tokens that the trial took.
        skipped: settings proposed before it that are known to be too dear.
    """

    settings: Settings
    verdict: str
    score: float
    cost: float
    n: int
    examples: int
    spent: int
    skipped: int = 0

    @classmethod
    def read(cls, values: dict[str, Any]) -> Trial:
        """From what `asdict` gave."""
        return cls(**{**values, "settings": Settings(**values["settings"])})


@dataclass
class Economy:
    """A search for sampling settings.

    Args:
        examples: what the answers are tried on.
        write: answers.
        read: text of an answer's tokens.
        score: text and expected answer -> 0 to 1.
        per_question: most new tokens that the answers to one question may take, on average.
        budget: new tokens that the tuning may take; the trial that exceeds it is unfinished.
        space: the limits of the settings.
        seed: of the proposals, the order of the examples and the answers.
        trials: what was tried before; the search goes on from there.
    """

    examples: Sequence[Example]
    write: Writer
    read: Callable[[Sequence[int]], str]
    score: Callable[[str, str], float]
    per_question: float
    budget: int
    space: Space = field(default_factory=Space)
    seed: int = 0
    trials: list[Trial] = field(default_factory=list)
    _written: dict[tuple[float, float, int, int], tuple[int, list[int]]] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        if not self.examples:
            raise RequestError("there are no examples to tune on; give one at least")
        if not (self.per_question > 0 and self.budget > 0):
            raise RequestError("both budgets must be above 0 tokens")

    @property
    def best(self) -> Trial | None:
        """The best whole trial; of equal ones the cheaper, then the earlier."""
        whole = [trial for trial in self.trials if trial.verdict == "whole"]
        return max(whole, key=lambda trial: (trial.score, -trial.cost), default=None)

    @property
    def spent(self) -> int:
        """New tokens of all trials."""
        return sum(trial.spent for trial in self.trials)

    def run(self) -> Iterator[Trial]:
        """Try settings until the budget is spent or nothing new is proposed."""
        while self.spent < self.budget:
            settings, skipped = self._propose()
            if settings is None:
                return
            self.trials.append(self._try(settings))
            self.trials[-1].skipped = skipped
            yield self.trials[-1]

    def _propose(self) -> tuple[Settings | None, int]:
        """What to try next, and how many were skipped; the seed and the trials so far decide."""
        rng = np.random.default_rng([self.seed, len(self.trials)])
        known, skipped = {trial.settings for trial in self.trials}, 0
        for attempt in range(_TRIES):
            best = self.best
            if not self.trials and not attempt:
                settings = self.space.cheapest()
            elif best is not None and rng.random() < 0.5:
                settings = self.space.near(best.settings, rng)
            else:
                settings = self.space.draw(rng)
            if settings in known:
                continue
            if self._is_too_dear(settings):
                skipped += 1
                continue
            return settings, skipped
        return None, skipped

    def _is_too_dear(self, settings: Settings) -> bool:
        """Whether less, of both, was too dear: cost rises with answers and with their length."""
        return any(
            trial.verdict == "dear"
            and trial.n <= settings.n
            and trial.settings.max_new_tokens <= settings.max_new_tokens
            for trial in self.trials
        )

    def _start(self, settings: Settings) -> int:
        """So many answers are known not to be too dear."""
        fine = [
            trial.n
            for trial in self.trials
            if trial.verdict == "whole" and trial.settings.max_new_tokens >= settings.max_new_tokens
        ]
        return max(1, min(settings.n, max(fine, default=1)))

    def _try(self, settings: Settings) -> Trial:
        order = np.random.default_rng(self.seed).permutation(len(self.examples))
        taken: dict[tuple[int, int], int] = {}  # (example, answer) -> its tokens
        left = self.budget - self.spent
        incumbent = self.best
        total = len(order)
        for n in _doubling(self._start(settings), settings.n):
            scores: list[float] = []
            costs: list[int] = []
            for size in _doubling(1, total):
                for index in order[len(scores) : size]:
                    answers = self._answers(int(index), settings, n)
                    taken |= {(int(index), i): len(a) for i, a in enumerate(answers)}
                    costs.append(sum(map(len, answers)))
                    scores.append(self._score(int(index), answers))
                    if sum(taken.values()) >= left:
                        break
                score, cost, seen = float(np.mean(scores)), float(np.mean(costs)), len(scores)
                result = (score, cost, n, seen, sum(taken.values()))
                if cost - _slack(seen, total) * n * settings.max_new_tokens > self.per_question:
                    return Trial(settings, "dear", *result)
                if result[-1] >= left and not (n == settings.n and seen == total):
                    return Trial(settings, "unfinished", *result)
                beaten = incumbent is not None and score + _slack(seen, total) < incumbent.score
                if beaten and n == settings.n:
                    return Trial(settings, "behind", *result)
        return Trial(settings, "whole", *result)

    def _answers(self, index: int, settings: Settings, n: int) -> list[list[int]]:
        return [self._answer(index, settings, which) for which in range(n)]

    def _answer(self, index: int, settings: Settings, which: int) -> list[int]:
        key = (settings.temperature, settings.top_p, index, which)
        length = settings.max_new_tokens
        asked, tokens = self._written.get(key, (0, []))
        if asked < length and len(tokens) == asked:
            tokens = self.write(self.examples[index].prompt, settings, self.seed + which)
            self._written[key] = length, tokens
        return tokens[:length]

    def _score(self, index: int, answers: Sequence[Sequence[int]]) -> float:
        """The score of the best of several answers."""
        found = [self.score(self.read(a), self.examples[index].answer) for a in answers]
        wrong = next((value for value in found if not 0 <= value <= 1), None)
        if wrong is not None:
            raise RequestError(f"the scorer gave {wrong}, expected 0 to 1")
        return max(found)

    def document(self) -> dict[str, Any]:
        """What was found, for a file from which the search can go on."""
        best = self.best
        return {
            "best": None if best is None else asdict(best),
            "spent": self.spent,
            "skipped": sum(trial.skipped for trial in self.trials),
            "trials": [asdict(trial) for trial in self.trials],
        }


def _doubling(first: int, last: int) -> Iterator[int]:
    """first, 2 first, ... and `last`."""
    size = first
    while size < last:
        yield size
        size *= 2
    yield last


def _slack(seen: int, total: int) -> float:
    """How far the mean of `seen` of `total` values of 0 to 1 may be from that of all.

    Hoeffding's bound for draws without replacement, as tightened by Serfling: 0 once all are seen.
    """
    half = 2 * seen <= total
    rest = 1 - (seen - 1) / total if half else (1 - seen / total) * (1 + 1 / seen)
    return sqrt(rest * log(1 / _DOUBT) / (2 * seen))


def writer(lm: LM, chat: bool = False, stop: Sequence[str] = ()) -> Writer:
    """Lets a model answer, drafted as usual; of its controls there is top_p alone."""

    def write(prompt: str, settings: Settings, seed: int) -> list[int]:
        output = lm.generate(
            [{"role": "user", "content": prompt}] if chat else prompt,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            controls={"top_p": settings.top_p} if settings.top_p < 1 else {},
            seed=seed,
            stop=stop,
        )
        if output.finish == "interrupted":
            raise KeyboardInterrupt
        return output.tokens

    return write


def reader(lm: LM, stop: Sequence[str] = ()) -> Callable[[Sequence[int]], str]:
    """Text of an answer's tokens, without stop tokens and stop strings."""
    ends = lm.model.defaults.stop_tokens

    def read(tokens: Sequence[int]) -> str:
        stream = TextStream(Detokenizer(lm.tokenizer), tuple(stop))
        cut = tokens[:-1] if tokens and tokens[-1] in ends else tokens
        return "".join(stream.push(token) for token in cut) + stream.flush()

    return read


def read_examples(path: Path) -> list[Example]:
    """Of a file with a JSON object {"prompt": ..., "answer": ...} on each line.

    Raises:
        RequestError: it cannot be read, or a line is none, with its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RequestError(f"cannot read the examples in {path}: {error.strerror}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            pair = values["prompt"], values["answer"]
        except (ValueError, TypeError, KeyError, RecursionError):
            pair = "", None
        if not (isinstance(pair[0], str) and pair[0] and isinstance(pair[1], str)):
            raise RequestError(
                f'line {number} of {path} is no example; write {{"prompt": "...", "answer": "..."}}'
            )
        found.append(Example(*pair))
    return found
