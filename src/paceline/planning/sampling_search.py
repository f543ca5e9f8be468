"""Search for sampling settings with the best score within a budget of tokens.

After Wang et al., Cost-Effective Hyperparameter Optimization for Large Language Model Generation
Inference, arXiv 2303.04673 (EcoOptiGen; catalogue 275). A trial begins with few answers to few
examples and doubles both. It is given up as soon as its cost must exceed the budget of a question
or its score must stay below the best; settings that ask for at least as much as others that were
too expensive are not tried at all. The paper proposes settings by BlendSearch; here half of them
are drawn at random and half near the best. A draw depends on the seed and its position only, so a
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

_TRIES = 64  # proposals for one trial before the search ends
_DOUBT = 0.05  # probability that a bound is wrong


@dataclass(frozen=True, slots=True)
class Example:
    """A question, and the answer that outputs are scored by."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """The settings that are tuned.

    Attributes:
        temperature: 0 is greedy.
        top_p: of the nucleus; 1 keeps all. Tuned instead of the temperature, as in the paper.
        n: number of answers to a question, of which the best counts.
        max_new_tokens: upper limit of each answer.
    """

    temperature: float
    top_p: float
    n: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """Limits of the settings; `tokens` and `n` are searched on a logarithmic scale."""

    temperature: tuple[float, float] = (0.0, 1.5)
    top_p: tuple[float, float] = (0.1, 1.0)
    n: tuple[int, int] = (1, 16)
    tokens: tuple[int, int] = (16, 256)

    def __post_init__(self) -> None:
        for name, (low, high), smallest in (
            ("temperature", self.temperature, 0.0),
            ("top_p", self.top_p, 1e-6),
            ("n", self.n, 1),
            ("tokens", self.tokens, 1),
        ):
            if not smallest <= low <= high < float("inf") or (name == "top_p" and high > 1):
                raise RequestError(
                    f"{name} is {low:g} to {high:g}, expected increasing limits in its range"
                )

    def cheapest(self) -> SamplingSettings:
        """Return the settings with which the search begins."""
        return SamplingSettings(self.temperature[0], 1.0, self.n[0], self.tokens[0])

    def draw(self, rng: np.random.Generator) -> SamplingSettings:
        """Draw settings from the whole space."""
        temperature, nucleus = 1.0, 1.0
        if rng.random() < 0.5:
            temperature = float(rng.uniform(*self.temperature))
        else:
            nucleus = float(rng.uniform(*self.top_p))
            temperature = float(np.clip(1.0, *self.temperature))
        n, tokens = (_whole(np.exp(rng.uniform(*np.log(ends))), ends) for ends in self._sizes())
        return self._settings(temperature, nucleus, n, tokens)

    def near(self, best: SamplingSettings, rng: np.random.Generator) -> SamplingSettings:
        """Draw settings near the best ones."""
        temperature, nucleus = best.temperature, best.top_p
        if nucleus < 1:
            nucleus = float(np.clip(nucleus + rng.normal(0, 0.1), *self.top_p))
        else:
            spread = 0.1 * (self.temperature[1] - self.temperature[0])
            temperature = float(np.clip(temperature + rng.normal(0, spread), *self.temperature))
        n, tokens = (
            _whole(size * 2 ** rng.uniform(-1, 1), ends)
            for size, ends in zip((best.n, best.max_new_tokens), self._sizes(), strict=True)
        )
        return self._settings(temperature, nucleus, n, tokens)

    def _settings(
        self, temperature: float, nucleus: float, n: int, tokens: int
    ) -> SamplingSettings:
        """Round settings; greedy answers are all the same, so one is enough."""
        temperature = round(temperature, 3)
        return SamplingSettings(
            temperature, round(nucleus, 3), n if temperature else self.n[0], tokens
        )

    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return self.n, self.tokens


def _whole(size: float, ends: tuple[int, int]) -> int:
    return int(np.clip(round(float(size)), *ends))


class Writer(Protocol):
    """Answers questions."""

    def __call__(self, prompt: str, settings: SamplingSettings, seed: int) -> list[int]:
        """Return the tokens of one answer; a shorter `max_new_tokens` gives its beginning."""
        ...


@dataclass(slots=True)
class Trial:
    """Settings that were tried.

    Attributes:
        verdict: `whole` (all examples), `expensive` (an answer costs too much), `behind` (the score
            stays below the best) or `unfinished` (the tuning budget was spent).
        score: mean over the examples that were used.
        cost: mean of their new tokens, of all n answers.
        n: answers over which score and cost were taken; less than requested if it was given up.
        examples: number of examples that were used.
        spent: new tokens that the trial took.
        skipped: settings proposed before it that are known to be too expensive.
    """

    settings: SamplingSettings
    verdict: str
    score: float
    cost: float
    n: int
    examples: int
    spent: int
    skipped: int = 0

    @classmethod
    def read(cls, values: dict[str, Any]) -> Trial:
        """Return the trial that `asdict` turned into `values`."""
        verdict = values["verdict"]
        verdict = "expensive" if verdict == "dear" else verdict  # as files of earlier versions say
        settings = SamplingSettings(**values["settings"])
        return cls(**{**values, "settings": settings, "verdict": verdict})


@dataclass
class SamplingSearch:
    """A search for sampling settings.

    Args:
        examples: questions that answers are tried on.
        write: writes answers.
        read: returns the text of an answer's tokens.
        score: text and expected answer -> 0 to 1.
        per_question: largest mean number of new tokens that the answers to one question may take.
        budget: new tokens that the tuning may take; the trial that exceeds it is unfinished.
        space: limits of the settings.
        seed: of the proposals, the order of the examples and the answers.
        trials: earlier trials; the search continues from there.
    """

    examples: Sequence[Example]
    write: Writer
    read: Callable[[Sequence[int]], str]
    score: Callable[[str, str], float]
    per_question: float
    budget: int
    space: SearchSpace = field(default_factory=SearchSpace)
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

    def _propose(self) -> tuple[SamplingSettings | None, int]:
        """Return the settings to try next, and how many were skipped, by seed and trials so far."""
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
            if self._is_too_expensive(settings):
                skipped += 1
                continue
            return settings, skipped
        return None, skipped

    def _is_too_expensive(self, settings: SamplingSettings) -> bool:
        """Return whether no more answers, no longer, were too expensive before."""
        return any(
            trial.verdict == "expensive"
            and trial.n <= settings.n
            and trial.settings.max_new_tokens <= settings.max_new_tokens
            for trial in self.trials
        )

    def _start(self, settings: SamplingSettings) -> int:
        """Return a number of answers that is known not to be too expensive."""
        fine = [
            trial.n
            for trial in self.trials
            if trial.verdict == "whole" and trial.settings.max_new_tokens >= settings.max_new_tokens
        ]
        return max(1, min(settings.n, max(fine, default=1)))

    def _try(self, settings: SamplingSettings) -> Trial:
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
                    return Trial(settings, "expensive", *result)
                if result[-1] >= left and not (n == settings.n and seen == total):
                    return Trial(settings, "unfinished", *result)
                beaten = incumbent is not None and score + _slack(seen, total) < incumbent.score
                if beaten and n == settings.n:
                    return Trial(settings, "behind", *result)
        return Trial(settings, "whole", *result)

    def _answers(self, index: int, settings: SamplingSettings, n: int) -> list[list[int]]:
        return [self._answer(index, settings, which) for which in range(n)]

    def _answer(self, index: int, settings: SamplingSettings, which: int) -> list[int]:
        key = (settings.temperature, settings.top_p, index, which)
        length = settings.max_new_tokens
        length_written, tokens = self._written.get(key, (0, []))
        if length_written < length and len(tokens) == length_written:
            tokens = self.write(self.examples[index].prompt, settings, self.seed + which)
            self._written[key] = length, tokens
        return tokens[:length]

    def _score(self, index: int, answers: Sequence[Sequence[int]]) -> float:
        """Return the score of the best of several answers."""
        scores = [self.score(self.read(a), self.examples[index].answer) for a in answers]
        wrong = next((value for value in scores if not 0 <= value <= 1), None)
        if wrong is not None:
            raise RequestError(f"the scorer returned {wrong}, expected 0 to 1")
        return max(scores)

    def document(self) -> dict[str, Any]:
        """Return the result, for a file from which the search can continue."""
        best = self.best
        return {
            "best": None if best is None else asdict(best),
            "spent": self.spent,
            "skipped": sum(trial.skipped for trial in self.trials),
            "trials": [asdict(trial) for trial in self.trials],
        }


def _doubling(first: int, last: int) -> Iterator[int]:
    """Yield first, 2 first, ... and `last`."""
    size = first
    while size < last:
        yield size
        size *= 2
    yield last


def _slack(seen: int, total: int) -> float:
    """Return how far the mean of `seen` of `total` values in 0..1 may be from that of all.

    Hoeffding's bound for draws without replacement, as tightened by Serfling: 0 once all are seen.
    """
    half = 2 * seen <= total
    rest = 1 - (seen - 1) / total if half else (1 - seen / total) * (1 + 1 / seen)
    return sqrt(rest * log(1 / _DOUBT) / (2 * seen))


def writer(lm: LM, chat: bool = False, stop: Sequence[str] = ()) -> Writer:
    """Return what lets a model answer, drafted as usual; its only control is top_p."""

    def write(prompt: str, settings: SamplingSettings, seed: int) -> list[int]:
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
    """Return what gives the text of an answer's tokens, without stop tokens and stop strings."""
    ends = lm.model.defaults.stop_tokens

    def read(tokens: Sequence[int]) -> str:
        stream = TextStream(Detokenizer(lm.tokenizer), tuple(stop))
        cut = tokens[:-1] if tokens and tokens[-1] in ends else tokens
        return "".join(stream.push(token) for token in cut) + stream.flush()

    return read


def read_examples(path: Path) -> list[Example]:
    """Read a file with a JSON object {"prompt": ..., "answer": ...} on each line.

    Raises:
        RequestError: it cannot be read, or a line is no such object, with its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RequestError(f"cannot read the examples in {path}: {error.strerror}") from None
    examples = []
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
                f"line {number} of {path} is not an example; "
                'write {"prompt": "...", "answer": "..."}'
            )
        examples.append(Example(*pair))
    return examples
