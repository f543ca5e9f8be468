"""Measures what the planner's cost model needs, with engines and drafters of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline import registry
from paceline.core import Request
from paceline.drafters.base import Drafter, engines_of
from paceline.engines.base import Engine
from paceline.engines.cost import measure_cost
from paceline.engines.cost_cache import known_cost, measure_streamed
from paceline.errors import RequestError
from paceline.kvcache.base import parse_policy
from paceline.lm import LM
from paceline.loading import open_budget
from paceline.measuring.bandwidth import measure_bandwidth
from paceline.measuring.baseline import decode
from paceline.measuring.memory import state_bytes
from paceline.measuring.prompts import Dialogue
from paceline.measuring.quality import score_window, text_windows
from paceline.measuring.recording import RecordingFixedBudget
from paceline.models import Model, load
from paceline.models.tokenizer import same_tokens
from paceline.models.trace import trace_path
from paceline.planning.batch_overhead import batch_overhead
from paceline.planning.decoded_loss import decoded_nats
from paceline.planning.draft_gains import THRESHOLDS, likely_passes, passes_needed, tree_sizes
from paceline.planning.measured_facts import (
    MAX_NODES,
    DraftFacts,
    EngineFacts,
    PromptFacts,
    ReadFacts,
)
from paceline.planning.model_sizes import page_bytes
from paceline.planning.scorers import scorer
from paceline.planning.settled_head import settle_head
from paceline.planning.setups import CacheForm

_NEAR, _FAR = 8, 512  # cached positions between which the slope of a pass's time is measured
_REPEATS, _REFERENCE_REPEATS = 5, 15
_STREAMED_SECONDS = 6.0  # of measuring T(n) where weights stream from disk
_PROMPT_SECONDS = 1.0  # after which reading a prompt is not timed again
_PROMPT_REPEATS = 3
_LONG, _SHORT = 512, 128  # tokens of such a prompt
_WINDOWS = 16
_TOO_SLOW = 2.0  # times as long as passes with full trees: drafts that can hardly pay
_DEFAULT_WINDOW, _TEXT_WINDOW = 128, 512  # tokens of a window of the built-in text, and of others


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
        self.prompts = PromptFacts(sum(sizes) / len(sizes), self._tokens, tuple(sizes))

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

    def warm_start(self) -> str:
        """Return what identifies the texts that `paceline warm` recorded; empty: none."""
        try:
            facts = trace_path(self.model).stat()
        except OSError:
            return ""
        return f"{facts.st_size} bytes of {facts.st_mtime_ns}"

    def bandwidth(self) -> float:
        """Return the memory bandwidth in bytes a second."""
        return measure_bandwidth().bytes_per_second

    def reference(self) -> float:
        """Return the seconds of a plain pass of the planned model now, the median.

        The shortest of a few may be that of a moment in which the machine ran faster.
        """
        engine = self.open(self._path, _options("auto")).engine
        near = min(_NEAR, engine.config.context // 4)
        return measure_cost(engine, near, (1,), _REFERENCE_REPEATS).seconds[0]

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
        streams = weights_memory is not None
        lm = self.open(path, _options(weight_format, threads=threads, weights=weights_memory))
        engine, context = lm.engine, lm.engine.config.context
        copy = settle_head(engine)
        cost = (
            measure_streamed(engine, _STREAMED_SECONDS)
            if streams
            else known_cost(engine, self._folder)
        )
        facts = EngineFacts(
            str(engine.format),
            _resident(engine, weights_memory) + copy,
            cost.nodes,
            cost.seconds,
            0.0 if streams else _slope(engine),  # the disk's speed varies by more
            _prompt_seconds(engine, min(_SHORT if streams else _LONG, context // 2)),
            int(engine.threads or 1),
            page_bytes(lm.model),
            engine.config.vocab_size,
            streamed=engine.streamed_bytes,
            batch_overhead=0.0 if streams else batch_overhead(lm, self.requests(lm), cost),
        )
        return facts.document()

    def streamed_pass(self, weights_memory: int) -> float:
        """Return the seconds of a plain pass now whose weights stream from disk, the median."""
        engine = self.open(self._path, _options("auto", weights=weights_memory)).engine
        return measure_cost(engine, min(_NEAR, engine.config.context // 4), (1,)).seconds[0]

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

    def drafts(self, drafter: str, nodes: int = MAX_NODES) -> dict[str, Any]:
        """Return `DraftFacts` of a drafter for the planned model as a document.

        Args:
            drafter: `NAME[:key=value,...]`.
            nodes: largest budget; smaller ones take the most likely nodes of the same trees.
        """
        lm = self.open(self._path, _options("auto"))
        built = registry.drafters.parse(drafter).build(lm.draft_target)
        requests = self.requests(lm)
        settle_head(lm.engine)
        first = decode(lm, built, requests[0], RecordingFixedBudget(nodes)).seconds  # not counted
        built.reset()
        if first.draft > _TOO_SLOW * first.forward:  # one answer says enough
            requests = requests[:1]
        needed, sizes = np.zeros(nodes + 1), np.zeros(nodes + 1)
        likely = np.zeros((2, len(THRESHOLDS)))
        passes, tokens, draft, overhead, forward = 0, 0, 0.0, 0.0, 0.0
        for request in requests:
            budget = RecordingFixedBudget(nodes)
            spent = decode(lm, built, request, budget).seconds
            trees, paths = zip(*budget.passes, strict=True) if budget.passes else ((), ())
            needed += passes_needed(trees, paths, nodes)
            sizes += tree_sizes(trees, nodes)
            likely += likely_passes(trees, paths)
            passes += len(trees)
            tokens += sum(map(len, paths))
            draft += spent.draft
            forward += spent.forward
            overhead += max(spent.decode - spent.draft - spent.forward, 0.0)
        alone = nodes != MAX_NODES or tokens == passes  # nothing for a budget to choose
        automatic = 0.0 if alone else self._automatic(lm, built, requests)
        engines, count = engines_of(built), max(passes, 1)
        facts = DraftFacts(
            tuple((tokens / needed.clip(1.0)).clip(1.0).tolist()),
            draft / count,
            overhead / count,
            forward / count,
            state_bytes(built),
            sum(int(each.weight_bytes or 0) for each in engines),
            sum(each.memory.page_bytes for each in engines),
            sizes=tuple((sizes / count).tolist()),
            likely_gained=tuple((tokens / likely[0].clip(1.0)).clip(1.0).tolist()),
            likely_sizes=tuple((likely[1] / likely[0].clip(1.0)).tolist()),
            automatic=automatic,
        )
        return facts.document()

    @staticmethod
    def _automatic(lm: LM, drafter: Drafter, requests: Sequence[Request]) -> float:
        """Return the seconds of a token with an automatic budget, which learns as it decodes."""
        drafter.reset()
        budget = open_budget("auto", lm.engine)
        outputs = [decode(lm, drafter, request, budget) for request in requests]
        seconds = sum(output.seconds.decode for output in outputs)
        return seconds / max(sum(len(output.tokens) for output in outputs), 1)

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
    weight_format: str,
    kv_format: str = "auto",
    threads: int | None = None,
    weights: int | None = None,
) -> dict[str, Any]:
    """Return the arguments of `LM`; `weights` are bytes of weights in memory, None for all."""
    options = {"dtype": weight_format, "kv_format": kv_format, "threads": threads}
    return options if weights is None else {**options, "weights_memory": weights}


def _slope(engine: Engine) -> float:
    """Return the seconds that a cached position adds to a plain pass."""
    context = engine.config.context
    near, far = min(_NEAR, context // 4), min(_FAR, context // 2)
    start, end = (
        measure_cost(engine, at, (1,), _REPEATS, pick=min).seconds[0] for at in (near, far)
    )
    return max((end - start) / max(far - near, 1), 0.0)


def _prompt_seconds(engine: Engine, tokens: int) -> float:
    """Return the seconds of a prompt token; long prompts are timed less often."""
    ids = (np.arange(tokens) % engine.config.vocab_size).astype(np.int32)
    times = [_start_seconds(engine, ids)]
    while len(times) < _PROMPT_REPEATS and sum(times) < _PROMPT_SECONDS:
        times.append(_start_seconds(engine, ids))
    return median(times) / tokens


def _start_seconds(engine: Engine, ids: NDArray[np.int32]) -> float:
    start = perf_counter()
    sequence = engine.start(ids)
    seconds = perf_counter() - start
    engine.release(sequence)
    return seconds
