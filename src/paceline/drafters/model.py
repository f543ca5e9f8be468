"""A second, smaller checkpoint as drafter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from paceline import _native
from paceline.abilities import Ability
from paceline.compatibility import Side, check, check_needs
from paceline.core import Exactness, Floats, Request, Tokens, TokenTree
from paceline.drafters.base import Drafter, Target
from paceline.drafters.draft_model.base import DraftSettings, ModelDrafter
from paceline.drafters.draft_model.cross_tokenizer import CrossTokenizer
from paceline.drafters.draft_model.frequent_tokens import FrequentTokens, generated_counts
from paceline.drafters.draft_model.parallel import ParallelDrafter
from paceline.drafters.draft_model.tree_growth import GrownTree, GrowthLimits, Judge, Run
from paceline.engines import open_like
from paceline.engines.base import Engine
from paceline.engines.follower import Follower
from paceline.engines.native import NativeEngine
from paceline.engines.view import View
from paceline.errors import MemoryFullError, MethodError
from paceline.models import Model, load
from paceline.models.tokenizer import same_tokens
from paceline.models.trace import known_trace
from paceline.registry import Source, check_range, drafters

SCHEDULES = ("serial", "pearl")


@drafters.register("model", Exactness.EXACT)
@dataclass(frozen=True, kw_only=True)
class DraftModel(DraftSettings):
    """Draft with a smaller model: another checkpoint, with the target's vocabulary or another.

    Each draft pass runs the `width` most likely nodes that were not run yet, and the tree is the
    best `budget` nodes by path probability. When sampling, the draft uses the noise that the walk
    will draw with, so that draft and target draw alike where they agree. Its probabilities are
    calibrated by which drafts were accepted. Keys and values follow the committed text from request
    to request. Nothing is drafted beyond the draft's own context.

    `path=A|B` names drafts from the smallest on: where the first is less certain than `trust`, the
    next is asked (S2D). `head=N` proposes only the N most frequent tokens, and reads only their
    rows of the draft's head (FR-Spec): those of the trace that `paceline warm` made of the target
    or, failing that, of the draft, and of the requests so far. `schedule=pearl` lets the draft
    continue in a thread of its own while the target verifies (PEARL). That thread wants a core:
    give the target one thread fewer than there are cores, unless its weights stream from disk, when
    cores wait for it (LLMCad). Which drafts are ready in time then differs from run to run, and so
    do the trees; the output does not.

    A draft with another vocabulary reads the text up to the last word, must first propose that
    word, and its drafts are tokenised again; it cannot use the noise, and special tokens are lost.

    State: one sharpness each for greedy and sampled requests, counts of `stop=bandit`, of the
    rejection walk and of the tokens for `head`. Memory: the draft's weights and cache. Cost of a
    proposal: up to `depth` passes of the draft, each over all nodes so far; all of it is charged to
    drafting.
    Good for: targets at least ten times larger than a draft of the same family, and targets that
    stream from disk.

    Based on Leviathan et al., arXiv 2211.17192; trees grow as in EAGLE-2, arXiv 2406.16858.

    Attributes:
        path: folder or hub id of the draft; several, from small to large, with |. Required.
        format: weight format of the draft, e.g. int8. Default auto: as stored.
        trust: with several drafts, the probability of the best successor below which the next
            larger draft is asked. Default 0.5.
        schedule: `serial` drafts while the target waits; or `pearl`. Default serial.
        wait: of `pearl`: draft passes that a proposal waits for, counting one that ran while the
            target verified; up to there `stop` decides. Default 1, as in the paper.
        head: number of tokens that the draft may propose. Default 0: all. Worth setting where the
            head is a good part of the draft: a vocabulary of tens of thousands and few layers.
        width: nodes that each draft pass runs. Default 4: more passes hide behind one of the
            target than rows do.
        depth: most draft passes for a proposal. Default 8.
        stop: ends drafting before that: `confidence` when the next pass is reached with too small
            a probability (SpecDec++), `bandit` by Thompson sampling (EESD), `depth` never.
            Default confidence.
        threshold: of `confidence`. Default 0.2: from there a draft pass that costs a tenth of the
            target's pays.
        rate: learning rate of the sharpness, 0 to 1. Default 0.02: about 50 tokens.
    """

    source = Source(
        authors="Leviathan et al.",
        title="Fast Inference via Speculative Decoding",
        arxiv="2211.17192",
    )

    path: str = field()
    format: str = "auto"
    trust: float = 0.5
    head: int = 0
    schedule: str = "serial"
    wait: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0.0, 1.0, "model", trust=self.trust)
        check_range(0, 1 << 24, "model", head=self.head)
        if self.schedule not in SCHEDULES:
            raise MethodError(
                f"model:schedule is {self.schedule!r}, expected {', '.join(SCHEDULES)}"
            )
        check_range(1, 64, "model", wait=self.wait)
        if self.schedule == "serial" and self.wait != type(self).wait:
            raise MethodError("model:schedule=serial waits for all draft passes; leave wait out")
        ends = (self.stop, self.threshold) == (type(self).stop, type(self).threshold)
        if self.schedule == "pearl" and self.wait == 1 and not ends:
            raise MethodError(
                "model:schedule=pearl drafts until the target is done and does not use stop and "
                "threshold; leave them out, or set wait above 1"
            )
        if "" in self.path.split("|"):
            raise MethodError(f"model:path is {self.path!r}, expected folders, with | between them")

    def build(self, target: Target) -> Drafter:
        """Load the drafts into engines like the target's.

        Raises:
            MethodError: a setting does not fit the drafts, e.g. another vocabulary with `pearl`.
            ModelError: a draft cannot be read.
        """
        models = [load(path) for path in self.path.split("|")]
        kinds = [_translation(model, target) for model in models]
        other = next((kind for kind in kinds if kind), None)
        sides = {Side.OTHER_TOKENS: "a draft with another tokenizer"} if other else {}
        if len(models) > 1:
            sides[Side.SEVERAL_DRAFTS] = "several drafts in model:path"
        if self.schedule == "pearl":
            sides[Side.PARALLEL_DRAFTING] = "model:schedule=pearl"
        check(sides)
        engines = [open_like(target.engine, model, self.format) for model in models]
        return Drafts(
            self,
            target.vocab_size,
            [Follower(engine) for engine in engines],
            other,
            self._frequent(engines, models, target, other),
        )

    def _frequent(
        self,
        engines: list[Engine],
        models: list[Model],
        target: Target,
        translation: CrossTokenizer | None,
    ) -> FrequentTokens | None:
        """Return the tokens that may be proposed; None if these are all."""
        size = min(target.vocab_size, *(engine.config.vocab_size for engine in engines))
        if not 0 < self.head < size:
            return None
        if translation is not None:
            other = "a draft with another tokenizer"
            check({Side.FREQUENT_HEAD: "model:head", Side.OTHER_TOKENS: other})
        for engine in engines:
            check_needs("model:head", {Ability.TOKENS}, engine.name, engine.abilities)
        traces = (
            known_trace(model, engine.config.vocab_size)
            for model, engine in zip(models, engines, strict=True)
        )
        trace = target.trace or next(filter(None, traces), None)
        return FrequentTokens(self.head, size, generated_counts(trace, size))


class Drafts(ModelDrafter):
    """Draft models from the smallest on, each with a cache of its own.

    Args:
        method: the settings.
        vocab_size: of the target.
        followers: run the drafts.
        translation: between the target's tokens and those of the only draft; None if they are the
            same.
        frequent: the tokens that may be proposed; None for all.
    """

    origins = ("model",)

    def __init__(
        self,
        method: DraftModel,
        vocab_size: int,
        followers: list[Follower],
        translation: CrossTokenizer | None = None,
        frequent: FrequentTokens | None = None,
    ) -> None:
        own = vocab_size if translation is None else followers[0].engine.config.vocab_size
        super().__init__(method, own, translation is None, frequent)
        self._trust, self._followers, self._translation = method.trust, followers, translation
        self._pearl = None
        if method.schedule == "pearl":
            engines = [each.engine for each in followers]
            native = [each for each in engines if isinstance(each, NativeEngine)]
            self._pearl = ParallelDrafter(method.wait, native)
        self.has_draft_probs = self.has_draft_probs and self._pearl is None
        self._rest = ""  # end of the text that drafts in other tokens must begin with
        self._known: tuple[bytes, tuple[Tokens, str]] | None = (
            None  # a text, and it in draft tokens
        )
        self._start = 0  # of what the drafts read of the text

    def fork(self) -> Drafter | None:
        """Return a fork, see `Drafter`; None with `pearl`, whose thread owns the engine."""
        if self._pearl is not None:
            return None
        other = super().fork()
        assert isinstance(other, Drafts)
        other._followers = [Follower(follower.engine) for follower in self._followers]
        return other

    def begin(self, request: Request) -> None:
        """See `Drafter`."""
        if self._pearl is not None:
            self._pearl.forget()
        super().begin(request)
        self._start = 0
        for follower in self._followers:
            follower.paced = False

    @property
    def engines(self) -> Sequence[Engine]:
        """Engines of the drafts."""
        return [follower.engine for follower in self._followers]

    def follow(self, context: Tokens, max_tokens: int | None = None) -> int:
        """See `Drafter`."""
        own, _ = self._own(context)
        if self._pearl is not None:
            self._pearl.stop()
            if any(follower.behind(own) for follower in self._followers):
                self._pearl.take_threads()
        for follower in self._followers:
            follower.paced = max_tokens is not None
        return max(follower.follow(own, max_tokens) for follower in self._followers)

    def follow_recent(self, context: Tokens, max_tokens: int) -> int:
        """See `ModelBacked`."""
        if self._pearl is not None:
            self._pearl.stop()
        own, _ = self._own(context)
        behind = max(follower.behind(own) for follower in self._followers)
        if behind > max_tokens and self._translation is None:
            self._start, self._last = max(len(context) - max_tokens, 0), None
        return self.follow(context) if behind else 0

    def ready(self, context: Tokens) -> bool:
        """Return whether the smallest draft, which drafts without the others, has caught up."""
        return not self._followers[0].behind(self._own(context)[0])

    def release(self) -> None:
        """See `Drafter`."""
        if self._pearl is not None:
            with suppress(Exception):  # an error of its thread does not concern the caller
                self._pearl.forget()
        for follower in self._followers:
            follower.reset()

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        """See `Drafter`."""
        if self._pearl is not None:
            self._pearl.stop()
            context = context.copy()  # which the next step changes while the thread reads it
        self.count(context)
        own, self._rest = self._own(context)
        if not len(own):
            return TokenTree.root(int(context[-1]))
        try:
            tree = self.grow(own, budget)
        except MemoryFullError:  # the pass can do without a draft
            return TokenTree.root(int(context[-1]))
        if self._translation is None:
            return tree
        return self._translation.back(context, own, self._rest, tree, budget)

    def expand(self, context: Tokens, limits: GrowthLimits, run: Run, judge: Judge) -> GrownTree:
        """See `ModelDrafter`."""
        if self._pearl is None:
            return super().expand(context, limits, run, judge)
        return self._pearl.grow(context, limits, run, judge)

    def room(self, context: Tokens) -> int:
        """See `ModelDrafter`."""
        return self._followers[0].room(context)

    def run(self, context: Tokens, tree: TokenTree, fresh: int) -> Floats:
        """See `ModelDrafter`."""
        smallest, *larger = self._followers
        view = None if self.ids is None else View(tokens=self.ids)
        logits = smallest.run(context, tree, view)[-fresh:]
        if self._rest and self._translation:
            logits = self._translation.begun(logits, tree, self._rest)
        for follower in larger:
            unsure = _native.top_k(np.ascontiguousarray(logits), 1)[1][:, 0] < self._trust
            if not unsure.any() or follower.room(context) < int(tree.depths().max()):
                break
            better = follower.run(context, tree, view)[-fresh:]
            width = min(logits.shape[1], better.shape[1])
            logits = np.where(unsure[:, None], better[:, :width], logits[:, :width])
        return logits

    def reset(self) -> None:
        """See `Drafter`."""
        self.release()
        super().reset()

    def _own(self, context: Tokens) -> tuple[Tokens, str]:
        """Return the text so far in draft tokens, and the end of it that they leave out."""
        if self._translation is None:
            return context[self._start :], ""
        text = context.tobytes()
        if self._known is None or self._known[0] != text:  # called a few times in each pass
            self._known = text, self._translation.into(context)
        return self._known[1]


def _translation(model: Model, target: Target) -> CrossTokenizer | None:
    """Return a translation between draft and target; None if they share a vocabulary."""
    theirs, size = target.tokenizer, model.config.vocab_size
    if theirs is None:
        if size == target.vocab_size:
            return None
        raise MethodError(
            f"the draft {model.name} has {size} tokens, the target {target.vocab_size}, and "
            "the target has no tokenizer to translate between them"
        )
    if same_tokens(model.tokenizer, theirs):
        return None
    return CrossTokenizer(model.tokenizer, theirs, target.vocab_size)
