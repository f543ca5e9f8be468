"""Measures what the planner's cost model needs, with engines and drafters of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from paceline import _native, registry
from paceline.core import Request, TokenTree
from paceline.decoding.governor import Paths, Trees
from paceline.drafters.base import engines_of
from paceline.engines.base import Engine
from paceline.engines.cost import measure_cost
from paceline.engines.cost_cache import known_cost
from paceline.engines.native import KV_FORMATS
from paceline.errors import RequestError
from paceline.kvcache.base import Policy, parse_policy
from paceline.lm import LM
from paceline.measuring.bandwidth import measure_bandwidth
from paceline.measuring.baseline import decode
from paceline.measuring.memory import state_bytes
from paceline.measuring.prompts import Dialogue
from paceline.measuring.quality import score_window, text_windows
from paceline.measuring.recording import RecordingFixedBudget
from paceline.models import Model, load
from paceline.models.tokenizer import same_tokens
from paceline.planning.cost_model import (
    MAX_NODES,
    DraftFacts,
    EngineFacts,
    PromptFacts,
    ReadFacts,
)
from paceline.planning.scorers import scorer
from paceline.planning.setups import CacheForm
from paceline.scoring import token_logprobs

_NEAR, _FAR = 8, 512  # cached positions between which the slope of a pass's time is measured
_REPEATS = 5
_DECODED = 16  # tokens of a pass whose tokens each choose what they read
_WINDOWS = 16
_DEFAULT_WINDOW, _TEXT_WINDOW = 128, 512  # tokens of a window of the built-in text, and of others


class Measuring(Protocol):
    """Makes the measurements of a plan; tests have one that measures nothing."""

    prompts: PromptFacts

    def fingerprint(self, path: str) -> str:
        """Return what identifies a checkpoint."""
        ...

    def check_tokens(self, path: str) -> None:
        """Refuse a checkpoint with other tokens than the model's."""
        ...

    def bandwidth(self) -> float:
        """Return the memory bandwidth in bytes a second."""
        ...

    def reference(self) -> float:
        """Return the seconds of a plain pass of the planned model, now."""
        ...

    def engine(
        self,
        path: str,
        weight_format: str,
        threads: int | None,
        weights_memory: int | None = None,
    ) -> dict[str, Any]:
        """Return `EngineFacts` as a document."""
        ...

    def reads(self, attention: str, cached: int) -> dict[str, Any]:
        """Return `ReadFacts` of an attention pattern as a document."""
        ...

    def nats(self, path: str, weight_format: str, cache: CacheForm, window: int) -> list[float]:
        """Return the nats a token of each window of the text."""
        ...

    def drafts(self, drafter: str) -> dict[str, Any]:
        """Return `DraftFacts` as a document."""
        ...

    def scores(self, path: str, weight_format: str, cache: CacheForm) -> list[float]:
        """Return the judge's score of the answer to each prompt."""
        ...


class EngineMeasurer:
    """Measures with the native engine. One model beside the planned one is open at a time.

    Args:
        model: that is planned for.
        dialogues: prompts; the first turn of each is decoded.
        text: on which losses are measured.
        own_text: it is the user's, and not the short one of this package.
        tokens: of an answer, at most.
        temperature: of the answers.
        judge: a command that scores answers; empty: none.
        folder: where cost curves are kept; None takes the cache folder.

    Raises:
        ModelError: the model cannot be read.
    """

    def __init__(
        self,
        model: str,
        dialogues: Sequence[Dialogue],
        text: str,
        own_text: bool = False,
        tokens: int = 48,
        temperature: float = 0.0,
        judge: str = "",
        folder: Path | None = None,
    ) -> None:
        self._path, self._text, self._own_text = model, text, own_text
        self._temperature, self._folder = temperature, folder
        self._judge = scorer("command", judge, seconds=60.0) if judge else None
        self._models = {model: load(model)}
        self._open: dict[tuple[object, ...], LM] = {}
        config = self._models[model].config
        self._tokens = max(1, min(tokens, config.context // 2))
        self._turns = [dialogue.turns[0] for dialogue in dialogues]
        room = config.context - self._tokens
        self._prompts = [self._encode(turn)[-room:] for turn in self._turns]
        sizes = [len(each) for each in self._prompts]
        self.prompts = PromptFacts(sum(sizes) / len(sizes), self._tokens)

    @property
    def question(self) -> list[object]:
        """Return what is measured on: prompts, answers and text."""
        return [self._prompts, self._tokens, self._temperature, self._text]

    @property
    def model(self) -> Model:
        """The checkpoint that is planned for."""
        return self._models[self._path]

    def checkpoint(self, path: str) -> Model:
        """Return a checkpoint, read when it is first asked for."""
        if path not in self._models:
            self._models[path] = load(path)
        return self._models[path]

    def fingerprint(self, path: str) -> str:
        """Return what identifies a checkpoint."""
        return self.checkpoint(path).fingerprint()

    def check_tokens(self, path: str) -> None:
        """Refuse a checkpoint with other tokens than the model's.

        Raises:
            RequestError: names both.
        """
        other = self.checkpoint(path)
        if not same_tokens(self.model.tokenizer, other.tokenizer):
            raise RequestError(
                f"{other.name} has other tokens than {self.model.name}, so that their losses "
                "cannot be compared; name checkpoints of one base"
            )

    def bandwidth(self) -> float:
        """Return the memory bandwidth in bytes a second."""
        return measure_bandwidth().bytes_per_second

    def reference(self) -> float:
        """Return the seconds of a plain pass of the planned model, now."""
        engine = self.open(self._path, _options("auto")).engine
        near = min(_NEAR, engine.config.context // 4)
        return measure_cost(engine, near, (1,), _REPEATS, pick=min).seconds[0]

    def open(self, path: str, options: dict[str, Any]) -> LM:
        """Return an opened model: the planned one, as it is stored, stays open, others do not."""
        key = (path, *sorted(options.items()))
        if key not in self._open:
            stored = (self._path, *sorted(_options("auto").items()))
            for other in [each for each in self._open if each != stored]:
                self._open.pop(other).close()
            self._open[key] = LM(path, engine="native", drafter="plain", budget=0, **options)
        return self._open[key]

    def engine(
        self,
        path: str,
        weight_format: str,
        threads: int | None,
        weights_memory: int | None = None,
    ) -> dict[str, Any]:
        """Return `EngineFacts` as a document."""
        options = _options(weight_format, threads=threads)
        if weights_memory is not None:
            options["weights_memory"] = weights_memory
        lm = self.open(path, options)
        engine, context = lm.engine, lm.engine.config.context
        cost = known_cost(engine, self._folder)
        near, far = min(_NEAR, context // 4), min(_FAR, context // 2)
        times = [
            measure_cost(engine, each, (1,), _REPEATS, pick=min).seconds[0] for each in (near, far)
        ]
        ids = (np.arange(far) % engine.config.vocab_size).astype(np.int32)
        facts = EngineFacts(
            str(engine.format),
            _resident(engine, weights_memory),
            cost.nodes,
            cost.seconds,
            max((times[1] - times[0]) / max(far - near, 1), 0.0),
            median(_start_seconds(engine, ids) for _ in range(3)) / far,
            int(engine.threads or 1),
            page_bytes(lm.model),
            engine.config.vocab_size,
        )
        return facts.document()

    def reads(self, attention: str, cached: int) -> dict[str, Any]:
        """Return `ReadFacts` of an attention pattern for the planned model as a document.

        A plain pass behind `cached` positions, as many as the model sees at most, is timed with and
        without it.
        """
        lm = self.open(self._path, _options("auto"))
        far = max(2, min(cached, lm.engine.config.context - 1))
        near, pages = min(_NEAR, far // 2), lm.engine.memory.page_bytes
        few = self.open(self._path, {**_options("auto"), "attention": attention})
        start, full, less = (
            measure_cost(each.engine, at, (1,), _REPEATS, pick=min).seconds[0]
            for each, at in ((lm, near), (lm, far), (few, far))
        )
        share = max(less - start, 0.0) / (full - start) if full > start else 1.0
        return ReadFacts(share, max(0, few.engine.memory.page_bytes - pages)).document()

    def nats(self, path: str, weight_format: str, cache: CacheForm, window: int) -> list[float]:
        """Return the nats a token of each window of the text.

        Args:
            path: of the checkpoint.
            weight_format: of its weights.
            cache: how keys and values are kept and read.
            window: tokens of a window; 0 takes a usual size.

        Raises:
            RequestError: the text is shorter than two windows.
        """
        options = _options(weight_format, cache.kv_format)
        if cache.attention is not None:
            options["attention"] = cache.attention
        lm = self.open(path, options)
        tokenizer = self.model.tokenizer
        usual = _TEXT_WINDOW if self._own_text else _DEFAULT_WINDOW
        size = min(window or usual, lm.engine.config.context)
        if not window:
            size = max(4, min(size, len(tokenizer.encode(self._text)) // 2 - 1))
        windows = text_windows(tokenizer, self._text, size, _WINDOWS)
        if not cache.far:
            return [float(score_window(lm.engine, row)[0].mean()) for row in windows.tokens]
        method = None if cache.policy is None else parse_policy(cache.policy)
        if method is not None:
            method.check(lm.engine)
        return [float(decoded_nats(lm.engine, method, row).mean()) for row in windows.tokens]

    def drafts(self, drafter: str) -> dict[str, Any]:
        """Return `DraftFacts` of a drafter for the planned model as a document."""
        lm = self.open(self._path, _options("auto"))
        built = registry.drafters.parse(drafter).build(lm.draft_target)
        requests = self.requests(lm)
        decode(lm, built, requests[0], RecordingFixedBudget(MAX_NODES))  # warm-up, not counted
        built.reset()
        gained = np.zeros(MAX_NODES + 1)
        passes, seconds, overhead, forward = 0, 0.0, 0.0, 0.0
        for request in requests:
            budget = RecordingFixedBudget(MAX_NODES)
            output = decode(lm, built, request, budget)
            trees, paths = zip(*budget.passes, strict=True) if budget.passes else ((), ())
            gained += gains(trees, paths)
            passes += len(trees)
            seconds += output.seconds.draft
            spent = output.seconds
            forward += spent.forward
            overhead += max(spent.decode - spent.draft - spent.forward, 0.0)
        engines = engines_of(built)
        facts = DraftFacts(
            tuple((gained / max(passes, 1)).clip(1.0).tolist()),
            seconds / max(passes, 1),
            overhead / max(passes, 1),
            forward / max(passes, 1),
            state_bytes(built),
            sum(int(each.weight_bytes or 0) for each in engines),
            sum(each.memory.page_bytes for each in engines),
        )
        return facts.document()

    def scores(self, path: str, weight_format: str, cache: CacheForm) -> list[float]:
        """Return the judge's score of the answer to each prompt, which is its last argument."""
        assert self._judge is not None
        options = _options(weight_format, cache.kv_format)
        options |= {"kv_policy": cache.policy, "attention": cache.attention}
        lm = self.open(path, options)
        scores = []
        for turn, request in zip(self._turns, self.requests(lm, ignore_eos=False), strict=True):
            scores.append(self._judge(lm.stream(request).run().text, turn))
        return scores

    def requests(self, lm: LM, ignore_eos: bool = True) -> list[Request]:
        """Return a request for each prompt."""
        return [
            lm.request(
                prompt,
                max_new_tokens=self._tokens,
                temperature=self._temperature,
                seed=seed,
                ignore_eos=ignore_eos,
            )
            for seed, prompt in enumerate(self._prompts)
        ]

    def close(self) -> None:
        """Close all models."""
        for lm in self._open.values():
            lm.close()
        self._open.clear()

    def _encode(self, turn: str) -> list[int]:
        tokenizer = self.model.tokenizer
        if tokenizer.template is None:
            return tokenizer.encode(turn)
        return tokenizer.encode_chat([{"role": "user", "content": turn}])


def _resident(engine: Engine, weights_memory: int | None) -> int:
    """Return the bytes of weights in memory."""
    whole = int(engine.weight_bytes or 0)
    return whole if weights_memory is None else min(whole, weights_memory)


def _options(
    weight_format: str, kv_format: str = "auto", threads: int | None = None
) -> dict[str, Any]:
    return {"dtype": weight_format, "kv_format": kv_format, "threads": threads}


def _start_seconds(engine: Engine, ids: NDArray[np.int32]) -> float:
    start = perf_counter()
    sequence = engine.start(ids)
    seconds = perf_counter() - start
    engine.release(sequence)
    return seconds


def page_bytes(model: Model) -> dict[str, int]:
    """Return the bytes of a page of the native engine's cache, by format; nothing is loaded."""
    sizes = {}
    for name in KV_FORMATS:
        empty = _native.NativeModel(model.config, "fp32", "fp32", name, "", 1)
        sizes[name] = int(empty.page_bytes)
    return sizes


def parameters(model: Model) -> int:
    """Return the number of weights in matrices; nothing is read."""
    shapes = [model.weights.shape(name) for name in model.weights]
    return sum(int(np.prod(shape)) for shape in shapes if len(shape) > 1)


def gains(trees: Trees, paths: Paths, max_nodes: int = MAX_NODES) -> NDArray[np.float64]:
    """Return the tokens that passes would have gained with smaller trees, float64 [max_nodes + 1].

    A tree is cut to its n nodes with the highest path probabilities; entry n is the sum over the
    passes of 1 for the root and 1 for each accepted node that is left.
    """
    total = np.zeros(max_nodes + 1)
    for tree, path in zip(trees, paths, strict=True):
        probs = np.array(tree.scores, np.float64)
        for node in range(1, len(tree)):
            probs[node] *= probs[tree.parents[node]]
        probs[0] = np.inf
        rank = np.empty(len(tree), np.int64)  # of each node, the root first
        rank[np.argsort(-probs, kind="stable")] = np.arange(len(tree))
        needed = np.array([rank[node] for node in path[1:]], np.int64)
        total += 1 + (needed[:, None] <= np.arange(max_nodes + 1)[None]).sum(0)
    return total


def decoded_nats(
    engine: Engine, policy: Policy | None, window: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Return the nats of window[1:] as if all of it were decoded, float64.

    A KV policy bounds the cache, or none does; an attention pattern of the engine chooses what each
    token reads.
    """
    sequence = engine.open()
    nats = []
    try:
        if policy is not None:
            policy.begin(engine, sequence)
        at, end = 0, len(window) - 1
        while at < end:
            size = min(_DECODED if policy is None else policy.distance(at), end - at)
            tree = TokenTree.chain(window[at : at + size])
            logits = engine.forward([(sequence, tree)])
            nats.append(-token_logprobs(logits, window[at + 1 : at + 1 + size]))
            engine.commit(sequence, np.arange(size))
            if policy is not None:
                policy.act(engine, sequence)
            at += size
    finally:
        engine.release(sequence)
    return np.concatenate(nats)
