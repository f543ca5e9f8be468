"""Planning: program search with tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import log, sqrt
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paceline.abilities import Ability
from paceline.control.logits import softmax
from paceline.core import Exactness
from paceline.decoding.strategies.base import SearchOutput, Strategy, Task
from paceline.decoding.strategies.hypotheses.search import Hypothesis, Search
from paceline.decoding.walk import edited
from paceline.errors import MethodError, RequestError
from paceline.registry import Source, check_range, strategies
from paceline.sandbox import SandboxLimits, check_sandbox, run_program

_BASE = 10.0  # the paper's c_base
_ROUNDS = 50  # rounds per completion, at most; most rounds meet a known completion


@strategies.register("planning", Exactness.LOSSY)
@dataclass(frozen=True)
class Planning(Strategy):
    """Search for a program that passes tests: Monte Carlo tree search over tokens.

    A node is a prefix of the output, and its children are the `k` most likely next tokens. Each
    round descends by the paper's P-UCB (best reward below, plus a bonus for likely and rarely
    visited children), expands a node, completes it greedily and runs the program. The reward is the
    share of tests passed, and is backed up to all nodes above. Completions use the walk, so they
    are drafted exactly, and ever better, as they resemble each other. A completion that is known
    from a node above costs nothing. The search ends at a reward of 1. The score of an output is its
    reward.

    Programs run in the sandbox of `sandbox.py` (Linux, x86-64), and only with `run_programs=true`.
    From Python, `reward` may score the text instead; then nothing is run.

    Cost: `rollouts` completions, and a pass for each expanded node. Memory: two caches.
    Good for: small programs, with a model that is right occasionally.

    Attributes:
        tests: path of a file with a JSON object {"input": ..., "output": ...} on each line: what a
            program reads and must print, up to trailing space. Default none, for `reward`.
        head: path of a file whose text precedes the output in the program. Default none.
        run_programs: whether programs of the model may be run. Default false.
        rollouts: number of completions, 1 to 100000. Default 32.
        k: number of children of a node, 1 to 256. Default 3, the paper's.
        explore: the paper's c, 0 to 1000. Default 4, the paper's.
        seconds: limit of processor time of one run, 0.1 to 60. Default 2.
        megabytes: limit of address space of one run, 32 to 16384. Default 256.
        returned: outputs given, the best ones. Default 1.
        reward: text -> reward, 0 to 1. From Python only.
    """

    tests: str = ""
    head: str = ""
    run_programs: bool = False
    rollouts: int = 32
    k: int = 3
    explore: float = 4.0
    seconds: float = 2.0
    megabytes: int = 256
    returned: int = 1
    reward: Callable[[str], float] | None = field(default=None, repr=False)

    source = Source(
        authors="Zhang et al.", title="Planning with LLMs for Code Generation", arxiv="2303.05510"
    )
    catalogue = (446,)
    revisits = True
    needs = frozenset({Ability.SANDBOX})

    def __post_init__(self) -> None:
        check_range(1, 100_000, self.name, rollouts=self.rollouts)
        check_range(1, 256, self.name, k=self.k)
        check_range(0, 1000, self.name, explore=self.explore)
        check_range(0.1, 60, self.name, seconds=self.seconds)
        check_range(32, 16384, self.name, megabytes=self.megabytes)
        check_range(1, 1024, self.name, returned=self.returned)

    @property
    def drafts(self) -> bool:
        """Whether it uses the walk: completions do."""
        return True

    def run(self, task: Task) -> list[SearchOutput]:
        """Return the programs with the best rewards."""
        self.check(task)
        planner = _Planner(self, task, self.reward or _Tests(self))
        with Search(task) as search:
            planner.plan(search)
        if not planner.known:
            return [search.output([], 0.0, False)]
        ranked = sorted(planner.known.items(), key=lambda item: (-item[1], len(item[0])))
        return [
            search.output(tokens, reward, bool(task.ends(tokens)))
            for tokens, reward in ranked[: self.returned]
        ]


class _Tests:
    """Scores a text as a program: the share of tests that it passes."""

    def __init__(self, settings: Planning) -> None:
        if not settings.run_programs:
            raise MethodError(
                "planning runs programs that the model writes; allow it with run_programs=true"
            )
        self._tests = _read_tests(settings.tests)
        self._head = _read(settings.head) if settings.head else ""
        self._limits = SandboxLimits(settings.seconds, settings.megabytes)
        check_sandbox()

    def __call__(self, text: str) -> float:
        runs = [(run_program(self._head + text, a, self._limits), b) for a, b in self._tests]
        passed = sum(result.ended == "exit" and _same(result.output, b) for result, b in runs)
        return passed / len(runs)


@dataclass(slots=True, eq=False)
class _PlanNode:
    """A prefix of the output.

    Attributes:
        prob: probability of its last token, given those before.
        value: best reward of a program with this prefix.
        children: None until it is expanded.
        closed: nothing below can be new.
    """

    tokens: tuple[int, ...]
    prob: float = 1.0
    visits: int = 0
    value: float = 0.0
    children: list[_PlanNode] | None = None
    closed: bool = False


class _Planner:
    """The search tree, and the rewards of known programs."""

    def __init__(self, settings: Planning, task: Task, score: Callable[[str], float]) -> None:
        self._settings, self._task, self._score = settings, task, score
        self.known: dict[tuple[int, ...], float] = {}  # complete outputs -> reward
        self._greedy: dict[tuple[int, ...], tuple[int, ...]] = {}  # prefix -> its greedy completion

    def plan(self, search: Search) -> None:
        """Search until a program is right, or the rollouts are spent."""
        prompt = list(self._task.request.prompt)
        live = search.start()
        root = _PlanNode(())
        completions = 0
        for _ in range(_ROUNDS * self._settings.rollouts):
            path = self._descend(root)
            node = path[-1]
            if node.children is None:
                search.move(live, [*prompt, *node.tokens])
                probs = softmax(edited(search.next_logits([live])[0], live.history, search.request))
                node.children = self._children(node, probs)
            if node.tokens not in self._greedy:
                if completions == self._settings.rollouts:
                    return
                completions += 1
                self._complete(search, node.tokens, live)
                if search.interrupted:
                    return
            reward = self.known[self._greedy[node.tokens]]
            for above in reversed(path):
                above.visits += 1
                above.value = max(above.value, reward)
                above.closed = bool(above.children is not None) and all(
                    child.closed for child in above.children or ()
                )
            if root.closed or max(self.known.values()) >= 1:
                return

    def _descend(self, root: _PlanNode) -> list[_PlanNode]:
        """Return the path from the root to a node that is not expanded."""
        path = [root]
        while children := path[-1].children:
            node = path[-1]
            path.append(
                max((c for c in children if not c.closed), key=lambda c: self._ucb(node, c))
            )
        return path

    def _ucb(self, parent: _PlanNode, child: _PlanNode) -> float:
        """Return the paper's P-UCB of a child."""
        beta = log((parent.visits + _BASE + 1) / _BASE) + self._settings.explore
        tried = sqrt(log(max(parent.visits, 1))) / (1 + child.visits)
        return child.value + beta * child.prob * tried

    def _children(self, node: _PlanNode, probs: NDArray[np.float64]) -> list[_PlanNode]:
        """Return the children of a node; those that end the output are scored at once."""
        order = np.argsort(-probs, kind="stable")[: self._settings.k]
        children = []
        for token in order[probs[order] > 0]:
            child = _PlanNode((*node.tokens, int(token)), float(probs[token]))
            if self._task.ends(child.tokens) or len(child.tokens) >= self._task.limit:
                self._greedy[child.tokens] = child.tokens
                child.value, child.closed = self._rewarded(child.tokens), True
                node.value = max(node.value, child.value)
            children.append(child)
        return children

    def _complete(self, search: Search, beginning: tuple[int, ...], held: Hypothesis) -> None:
        """Complete a prefix greedily, and score the result."""
        task = self._task
        request = replace(
            task.seeded(task.request.seed),
            prompt=(*task.request.prompt, *beginning),
            max_new_tokens=task.limit - len(beginning),
        )
        output = search.decode(request, held)
        if output.finish == "interrupted":
            search.interrupted = True
            return
        tokens = (*beginning, *output.tokens)
        self._rewarded(tokens)
        # Greedy decoding from any prefix on the way gives the same completion.
        for size in range(len(beginning), len(tokens) + 1):
            self._greedy.setdefault(tokens[:size], tokens)

    def _rewarded(self, tokens: tuple[int, ...]) -> float:
        if tokens not in self.known:
            self.known[tokens] = self._score(self._task.read(tokens)[0])
        return self.known[tokens]


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RequestError(f"cannot read {name}: {error.strerror}") from None


def _read_tests(name: str) -> list[tuple[str, str]]:
    """Read inputs and expected outputs.

    Raises:
        RequestError: there are none, or a line is malformed.
    """
    if not name:
        raise MethodError("planning needs tests; write planning:tests=FILE,run_programs=true")
    tests = []
    for number, line in enumerate(_read(name).splitlines(), 1):
        if not line.strip():
            continue
        try:
            test = json.loads(line)
            pair = test["input"], test["output"]
        except (ValueError, TypeError, KeyError, RecursionError):
            pair = None, None
        if not all(isinstance(text, str) for text in pair):
            raise RequestError(
                f'line {number} of {name} is not a test; write {{"input": "...", "output": "..."}}'
            )
        tests.append(pair)
    if not tests:
        raise RequestError(f"{name} holds no tests")
    return tests


def _same(printed: str, expected: str) -> bool:
    """Return whether two outputs are equal up to spaces at the ends of lines and of the text."""
    lines = [[line.rstrip() for line in text.rstrip().splitlines()] for text in (printed, expected)]
    return lines[0] == lines[1]
