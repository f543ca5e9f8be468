"""What the files of this folder share: the contract of a search, and hypotheses side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from types import TracebackType
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from paceline.control.base import Following, Looking
from paceline.core import Exactness, Floats, Output, Request, TokenTree
from paceline.decoding.governor import Budget, Fixed
from paceline.decoding.loop import Generation
from paceline.decoding.run import check_request
from paceline.decoding.text import TextStream
from paceline.drafters.base import Drafter, Target
from paceline.engines.base import Cached, Engine
from paceline.errors import MethodError, ModelError, RequestError
from paceline.registry import drafters


@dataclass(slots=True)
class Found(Output):
    """One output of a search; its passes, nodes and seconds are those of the whole search.

    Attributes:
        score: what outputs were ranked by, the higher the better; each strategy says what it is.
    """

    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Task:
    """What is searched, and with what.

    Attributes:
        engine: runs the model.
        request: what is asked for.
        stream: turns tokens into text and finds stop strings; None when only tokens matter.
        rebind: makes the request again for another seed, with controls of its own; some controls
            follow one text only.
        drafter: for strategies that draft; None decodes plainly.
        another: makes one more, for texts side by side.
        budget: how many nodes a draft tree may have.
    """

    engine: Engine
    request: Request
    stream: Callable[[], TextStream] | None = None
    rebind: Callable[[int], Request] | None = None
    drafter: Drafter | None = None
    another: Callable[[], Drafter] | None = None
    budget: Budget = field(default_factory=lambda: Fixed(0))

    def seeded(self, seed: int) -> Request:
        """The request with another seed.

        Raises:
            MethodError: its noise is bound to its seed, and nothing makes it again.
        """
        if self.rebind:
            return self.rebind(seed)
        if self.request.noise is not None and seed != self.request.seed:
            raise MethodError("a watermark's noise is bound to one seed; give the task a rebind")
        return replace(self.request, seed=seed)

    @property
    def limit(self) -> int:
        """Most new tokens that the request and the model's context allow."""
        room = self.engine.config.context - len(self.request.prompt)
        return min(self.request.max_new_tokens, room)

    def read(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """Text of new tokens, and whether a stop token or stop string ends them."""
        ended = bool(tokens) and tokens[-1] in self.request.stop_tokens
        if self.stream is None:
            return "", ended
        stream = self.stream()
        text = "".join(stream.push(token) for token in (tokens[:-1] if ended else tokens))
        return text + stream.flush(), ended or stream.stopped

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether a stop token or stop string ends new `tokens`."""
        if tokens[-1] in self.request.stop_tokens or not self.request.stop_strings:
            return tokens[-1] in self.request.stop_tokens
        return self.read(tokens)[1]


@dataclass(frozen=True)
class Strategy(ABC):
    """Settings of a search: the fields of a subclass are its hyper-parameters.

    Attributes:
        draws: it draws tokens, so that temperature and seed matter; the others are deterministic.
        guided: it lets guides look at the trees before each pass.
        paper: where it is from.
        catalogue: its numbers in the catalogue of methods.
        needs: what it cannot do without, in words.
    """

    exactness: ClassVar[Exactness]  # set by the registry
    name: ClassVar[str]  # set by the registry
    draws: ClassVar[bool] = False
    guided: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    catalogue: ClassVar[tuple[int, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()

    @property
    def drafts(self) -> bool:
        """Whether it goes through the walk, so that a drafter makes it faster."""
        return False

    @abstractmethod
    def run(self, task: Task) -> list[Found]:
        """The outputs, best first; after a `KeyboardInterrupt` what there is, so marked.

        Every sequence is released, whatever happens.

        Raises:
            PacelineError: the task is not one for this strategy, in one sentence.
        """

    def check(self, task: Task) -> None:
        """Refuse a request that this strategy cannot follow.

        Raises:
            RequestError, MethodError: what is wrong and what to do.
        """
        request = task.request
        check_request(task.engine, request)
        if request.temperature > 0 and not self.draws:
            raise RequestError(
                f"the temperature is {request.temperature:g}, but {self.name} draws nothing; "
                "leave it out, or give 0"
            )
        if request.walk != "gumbel":
            raise MethodError(f"{self.name} knows one walk; leave --walk {request.walk} out")
        if not self.guided and any(isinstance(c, Looking) for c in request.controls):
            raise MethodError(
                f"{self.name} cannot follow guides yet; leave the guide out, or take best_of"
            )
        if request.noise is not None and not self.draws:
            raise RequestError(
                f"{self.name} draws nothing, so that this watermark cannot mark its output; "
                "leave it out"
            )
        if request.prediction and not self.drafts:
            raise RequestError(f"{self.name} drafts nothing; leave the prediction out")
        if not self.draws and any(isinstance(control, Following) for control in request.controls):
            raise MethodError(
                f"{self.name} follows several texts, and one of the controls only one; "
                "leave mirostat out"
            )


@dataclass(slots=True, eq=False)
class Hypothesis:
    """A text under way: `sequence` holds all of `history` but its last token.

    Attributes:
        history: the prompt and the new tokens.
        score: sum of their log chances, in nats.
    """

    history: list[int]
    score: float
    sequence: Cached


class Search:
    """A search under way: its sequences, all of which are released at the end, and its cost.

    As a context it swallows a `KeyboardInterrupt` and remembers it in `interrupted`.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.engine = task, task.engine
        self.cost = Output()
        self.interrupted = False
        self._live: list[Cached] = []
        self._decoded = False
        self._begun = perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> bool:
        for sequence in self._live:
            self.engine.release(sequence)
        self._live = []
        seconds = self.cost.seconds
        seconds.decode = perf_counter() - self._begun - seconds.prefill
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.interrupted |= stopped
        return stopped

    def start(self, observe: Callable[[int, TokenTree, Floats], None] | None = None) -> Hypothesis:
        """The prompt, run but for its last token."""
        begun = perf_counter()
        prompt = self.task.request.prompt
        sequence = self.engine.start(np.array(prompt[:-1], np.int32), observe)
        self._live.append(sequence)
        self.cost.seconds.prefill += perf_counter() - begun
        return Hypothesis(list(prompt), 0.0, sequence)

    def fork(self, sequence: Cached) -> Cached:
        """An independent copy of what is committed."""
        copy = self.engine.fork(sequence)
        self._live.append(copy)
        return copy

    def release(self, sequence: Cached) -> None:
        """Give one back before the end."""
        self._live = [other for other in self._live if other is not sequence]
        self.engine.release(sequence)

    def forward(self, batch: Sequence[tuple[Cached, TokenTree]]) -> Floats:
        """One pass over all trees; see `Engine.forward`."""
        begun = perf_counter()
        logits = self.engine.forward(batch)
        self.cost.passes += 1
        self.cost.nodes += sum(len(tree) for _, tree in batch)
        self.cost.seconds.forward += perf_counter() - begun
        return logits

    def bring(self, sequence: Cached, held: Sequence[int], wanted: Sequence[int]) -> None:
        """Let a sequence that holds the tokens `held` hold `wanted`; what they share stays."""
        pairs = enumerate(zip(held, wanted, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(held), len(wanted)))
        if same < len(held):
            self.engine.truncate(sequence, same)
        if same < len(wanted):
            self.engine.extend(sequence, np.array(wanted[same:], np.int32))
            self.cost.passes += 1
            self.cost.nodes += len(wanted) - same

    def look(self, live: Sequence[Hypothesis]) -> Floats:
        """Logits [B, V] of what follows each hypothesis, in one pass."""
        return self.forward([(h.sequence, TokenTree.root(h.history[-1])) for h in live])

    def grow(
        self, live: Sequence[Hypothesis], chosen: Sequence[tuple[Hypothesis, int, float]]
    ) -> list[Hypothesis]:
        """What becomes of `live` after a `look`: a (parent, token, score) each, in that order.

        The sequence of a parent goes to its first child, its other children get forks; one
        without children is released. So never more are open than there are hypotheses.
        """
        parents = {id(parent) for parent, _, _ in chosen}
        for hypothesis in live:
            if id(hypothesis) not in parents:
                self.release(hypothesis.sequence)
        children, taken = [], set()
        for parent, token, score in chosen:
            sequence = parent.sequence
            if id(parent) in taken:
                sequence = self.fork(sequence)
            else:
                self.engine.commit(sequence, [0])
                taken.add(id(parent))
            children.append(Hypothesis([*parent.history, token], score, sequence))
        return children

    def decode(self, request: Request, held: Cached) -> Output:
        """A text through the loop, drafted by the task's drafter, plainly without one.

        `held` holds the request's prompt but for its last token; a fork of it goes on. The first
        text is run from its beginning, so that a drafter can learn from the prompt.
        """
        task = self.task
        drafter, budget = task.drafter, task.budget
        if drafter is None:
            drafter = drafters.parse("plain").build(Target(self.engine.config.vocab_size))
            budget = Fixed(0)
        anew = drafter.learns_from_prompt and not self._decoded
        self._decoded = True
        sequence = None if anew else self.engine.fork(held)
        stream = task.stream() if task.stream else None
        generation = Generation(self.engine, drafter, request, budget, stream, sequence=sequence)
        output = generation.run()
        cost, more = self.cost, output.seconds
        cost.passes += output.passes
        cost.nodes += output.nodes
        cost.seconds = replace(
            cost.seconds,
            prefill=cost.seconds.prefill + more.prefill,
            draft=cost.seconds.draft + more.draft,
            forward=cost.seconds.forward + more.forward,
            walk=cost.seconds.walk + more.walk,
        )
        for name, count in output.accepted.items():
            cost.accepted[name] = cost.accepted.get(name, 0) + count
        return output

    def found(self, tokens: Sequence[int], score: float, ended: bool) -> Found:
        """An output of this search."""
        task = self.task
        finish = "length" if task.limit == task.request.max_new_tokens else "context"
        if self.interrupted and not ended and len(tokens) < task.limit:
            finish = "interrupted"
        return Found(
            tokens=list(tokens),
            text=task.read(tokens)[0],
            finish="stop" if ended else finish,
            passes=self.cost.passes,
            nodes=self.cost.nodes,
            seconds=replace(self.cost.seconds),
            reading=task.request.reading,
            score=score,
        )


def log_chances(logits: Floats, history: list[int], request: Request) -> NDArray[np.float64]:
    """Log chances [V] of the model's own, plus what the controls add; -inf where they forbid.

    They are not normalised again: of the texts that the controls allow, a search shall find the
    one that the model likes best, and not one that it was forced into.

    Raises:
        ModelError: the model gave logits that are not numbers.
    """
    wide = logits.astype(np.float64)
    top = float(wide.max())
    if not np.isfinite(top):
        raise ModelError(
            f"the model's logits at position {len(history)} are not finite; "
            "its weights or its number format cannot represent this text"
        )
    total = top + float(np.log(np.exp(wide - top).sum()))
    for control in request.controls:
        logits = control.apply(logits, history)
    found: NDArray[np.float64] = logits.astype(np.float64) - total
    return found


def best(scores: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Flat places of the `count` best finite scores, best first; of equal ones the lower first."""
    flat = scores.ravel()
    if count < len(flat):
        least = np.partition(flat, len(flat) - count)[len(flat) - count]
        places = np.flatnonzero(flat >= least)
    else:
        places = np.arange(len(flat))
    places = places[np.isfinite(flat[places])]
    return places[np.argsort(-flat[places], kind="stable")][:count]


def dead_end(position: int) -> RequestError:
    """The error of a search that is left with nothing."""
    return RequestError(f"the controls allow no token at position {position}")
