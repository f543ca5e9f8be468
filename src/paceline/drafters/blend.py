"""Blend: every source of drafts in one tree, each as far as it is worth its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from paceline import _native
from paceline.abilities import Ability
from paceline.control.base import paths
from paceline.control.capabilities import Mask, MasksTokens
from paceline.core import Exactness, Request, State, Step, Tokens, TokenTree
from paceline.drafters.base import (
    Drafter,
    DraftMethod,
    ModelBacked,
    Target,
    prompt_steps,
    step_arrays,
)
from paceline.drafters.history.warm_start import start_of
from paceline.drafters.member_account import MemberAccount, followed
from paceline.drafters.recycle import Recycle, load_mixer, mixer_state
from paceline.drafters.state import checked
from paceline.drafters.suffix import Suffix, automata_state, load_automata
from paceline.errors import MemoryFullError, MethodError
from paceline.noise import noise_of
from paceline.registry import Source, check_range, drafters

if TYPE_CHECKING:
    from paceline.engines.base import Cached, Engine

_MAX_MEMBERS = 14  # origins are numbered in four bits
_OWN = ("recycle", "suffix")
_ORDERS, _SKIPS = 5, 1  # as of `recycle`; native/drafting/blend_prior.hpp is made for these
_ASK = ("worth", "always")
_LARGEST = 8.0  # limit of the weights of the known noise
_RECENT = 128  # tokens that a model reads again after a rest
_Allowed = Callable[[Sequence[int]], Mask | None]


@drafters.register("blend", Exactness.EXACT)
@dataclass(frozen=True)
class Blend(DraftMethod):
    """Blend every source of drafts into one tree, each as far as it is worth its time; the default.

    `recycle` keeps the model's distributions by context, `suffix` the continuations of the longest
    matches; `members` are further drafters, which propose trees. All of them contribute at every
    node of the tree: the probability of a token is the softmax of their weighted log probabilities
    (see `recycle`). So the same token from several sources is one node with one probability, and
    each source also continues what another proposed. How far to trust a kind of source (a context
    by its length and count, a match by its length and count, a member by its depth) is learnt from
    every drawn token, from weights that were fitted to other texts. What the model held for likely
    at the last three positions, and did not draw, is one more source: it often comes soon. The
    tree grows best-first by path probability.

    When sampling, the noise that the walk will draw with is known and tells which of the likely
    tokens wins; how much to rely on it is learnt, too. Under a grammar only allowed tokens are
    proposed, and all of them where there are few.

    A member is asked while its drafts pay, at the time that a token takes now. Where it runs a
    model or a head, a tree without it is grown as well, and what it gains are the drawn tokens that
    only the tree with it holds; of other members an accepted token is credited in equal parts to
    those that proposed it. A member that costs more than it gains rests, and is tried again as
    often as 1/200 of the time pays for.

    State: that of `recycle`, `suffix` and each member. Cost of a proposal: some 2 microseconds a
    node, and the members' own.
    Good for: everything.

    Attributes:
        members: further drafters, `+` between them and `;` between the settings of one, as in
            `predicted_output+model:path=FOLDER;format=int8`. Default `predicted_output+forced`,
            which cost nothing unless the request has a prediction or controls.
        capacity: contexts kept, as of `recycle`. Default 262144.
        reach: tokens kept, as `capacity` of `suffix`. Default 262144.
        rate: learning rate of the weights, 0 to 1. Default 0.05: half that of `recycle`, since the
            weights start trained.
        ask: `worth` lets members rest as described; `always` does not, so that trees depend on
            nothing but the text. Default worth.
        warm: start from the trace that `paceline warm` recorded of this model, if there is one.
            Default true.
    """

    source = Source(note="ours; mixing in the logistic domain after Mahoney, PAQ, 2005")
    examples = ("blend", "blend:members=,capacity=8,reach=8")

    members: str = "predicted_output+forced"
    capacity: int = 1 << 18
    reach: int = 1 << 18
    rate: float = 0.05
    ask: str = "worth"
    warm: bool = True

    def __post_init__(self) -> None:
        check_range(8, 1 << 26, "blend", capacity=self.capacity)
        check_range(2, 1 << 26, "blend", reach=self.reach)
        check_range(0.0, 1.0, "blend", rate=self.rate)
        if self.ask not in _ASK:
            raise MethodError(f"blend:ask is {self.ask!r}, expected {' or '.join(_ASK)}")
        methods = self.methods()
        if len(methods) > _MAX_MEMBERS:
            raise MethodError(f"blend has {len(methods)} members, expected {_MAX_MEMBERS} at most")
        for method in methods:
            if isinstance(method, (Blend, Recycle, Suffix)):
                raise MethodError(
                    f"blend:members names {method.name}, which it has in itself; leave it out"
                )

    def methods(self) -> list[DraftMethod]:
        """Return the members' settings."""
        earlier = '"' not in self.members  # commas were written as semicolons
        return drafters.parse_several(self.members.replace(";", ",") if earlier else self.members)

    def build(self, target: Target) -> Drafter:
        """Return a drafter and its members, which have learnt nothing yet."""
        return _Blend(self, target)


@dataclass
class _Asked:
    """One pass: which members were asked, what each cost, and which proposed each node."""

    seconds: dict[int, float] = field(default_factory=dict)
    named: dict[tuple[int, ...], int] = field(default_factory=dict)  # empty if no member proposed
    at: float = 0.0
    tree: tuple[Tokens, Tokens] | None = None  # tokens and parents, as proposed
    without: tuple[Tokens, Tokens] | None = None  # likewise, without the members that run models


class _Blend(ModelBacked):
    def __init__(self, method: Blend, target: Target) -> None:
        self._method = method
        self._target, self._vocab_size = target, target.vocab_size
        self._members = [member.build(target) for member in method.methods()]
        recycle, suffix = Recycle(), Suffix()
        self._blend = _native.SourceBlend(
            _ORDERS,
            _SKIPS,
            recycle.k,
            method.capacity,
            recycle.keep,
            method.rate,
            method.reach,
            suffix.k,
            len(self._members),
        )
        self.origins = (*_OWN, *(member.name for member in method.methods()))
        self.top_k = min(max(recycle.k, *(m.top_k for m in self._members), 1), target.vocab_size)
        self.learns_from_prompt = any(member.learns_from_prompt for member in self._members)
        self.needs_hidden = any(member.needs_hidden for member in self._members)
        self.needs = frozenset[Ability]().union(*(member.needs for member in self._members))
        self.uses_prediction = any(member.uses_prediction for member in self._members)
        self._forget()
        self._start = start_of(self, target, method.warm)
        self._forget()  # a replay has no passes, and so measures no member

    def fork(self) -> Drafter:
        other = copy(self)
        other._blend = self._blend.fork()
        methods = zip(self._members, self._method.methods(), strict=True)
        other._members = [m.fork() or method.build(self._target) for m, method in methods]
        other._forget()
        other._worth = self._worth
        return other

    def _forget(self) -> None:
        self._worth = [MemberAccount() for _ in self._members]
        self._asked = _Asked()
        self._token = 0.0  # seconds, running mean
        self._prompt, self._request = 0, Request((), 0)
        self._unread: tuple[int, ...] = ()  # prompt
        self._rested: set[int] = set()  # members that have not read the text meanwhile
        self._silent: set[int] = set()  # members that have nothing to propose for this request
        self._learning: dict[int, float] = {}  # seconds that members took to observe
        self._starts: dict[int, int | None] = {}  # of the noise, by position
        self._masking: MasksTokens | None = None

    def begin(self, request: Request) -> None:
        self._prompt, self._request, self._starts = len(request.prompt), request, {}
        self._unread = () if self.learns_from_prompt else request.prompt
        self._masking = next((c for c in request.controls if isinstance(c, MasksTokens)), None)
        self._blend.begin()
        for i, member in enumerate(self._members):
            member.begin(request)
            if member.uses_prediction and request.prediction:
                self._worth[i] = MemberAccount()  # it has something new to follow
            if member.certain and request.controls:
                self._worth[i] = MemberAccount()
        self._silent = {
            i
            for i, m in enumerate(self._members)
            if (m.certain and not request.controls)
            or (m.only_prediction and not request.prediction)
        }

    def attach(self, sequence: Cached) -> None:
        for member in self._model_backed():
            member.attach(sequence)

    @property
    def engines(self) -> Sequence[Engine]:
        return [engine for member in self._model_backed() for engine in member.engines]

    def follow(self, context: Tokens, max_tokens: int | None = None) -> int:
        backed = [m for m in self._awake() if isinstance(m, ModelBacked)]
        return max((member.follow(context, max_tokens) for member in backed), default=0)

    def follow_recent(self, context: Tokens, max_tokens: int) -> int:
        backed = [m for m in self._awake() if isinstance(m, ModelBacked)]
        return max((member.follow_recent(context, max_tokens) for member in backed), default=0)

    def release(self) -> None:
        for member in self._model_backed():
            member.release()

    def _rests(self, member: int) -> bool:
        return self._worth[member].resting and self._method.ask == "worth"

    def _awake(self) -> list[Drafter]:
        return [member for i, member in enumerate(self._members) if not self._rests(i)]

    def _model_backed(self) -> list[ModelBacked]:
        return [member for member in self._members if isinstance(member, ModelBacked)]

    def read_prompt(self) -> None:
        for step in prompt_steps(self._unread):
            self._blend.observe(*step_arrays(step), False)
        self._unread = ()
        for member in self._members:
            member.read_prompt()

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        asked = _Asked()
        proposals = []
        for i, member in enumerate(self._members):
            if i in self._silent:
                continue
            if self._rests(i):
                self._rested.add(i)
                continue
            start = perf_counter()
            if i in self._rested and isinstance(member, ModelBacked):
                with suppress(MemoryFullError):  # it proposes nothing then
                    member.follow_recent(context, _RECENT)
            self._rested.discard(i)
            proposal = member.propose(context, budget)
            asked.seconds[i] = perf_counter() - start
            if len(proposal) > 1:
                proposals.append(
                    (i, member.certain, proposal.tokens, proposal.parents, proposal.scores)
                )
        noise, allowed = self._foreseen(context, budget)
        given = (context, budget, min_path_prob)
        cheap = [each for each in proposals if not isinstance(self._members[each[0]], ModelBacked)]
        if len(cheap) < len(proposals) and self._method.ask == "worth":
            start = perf_counter()
            asked.without = self._blend.propose(*given, cheap, noise, allowed)[:2]
            share = (perf_counter() - start) / (len(proposals) - len(cheap))
            for i in {each[0] for each in proposals} - {each[0] for each in cheap}:
                asked.seconds[i] += share
        tokens, parents, scores, origin, named = self._blend.propose(
            *given, proposals, noise, allowed
        )
        tree = TokenTree.trusted(tokens, parents, scores, origin)
        if proposals:
            asked.named = dict(zip(paths(tree), named.tolist(), strict=True))
            asked.tree = (tokens, parents)
        asked.at = perf_counter()
        self._asked = asked
        return tree

    def _foreseen(self, context: Tokens, budget: int) -> tuple[list[int], _Allowed | None]:
        """Return where the noise of the next draws starts, and what a grammar allows there."""
        noise = []
        for position in range(len(context), len(context) + budget):
            if position not in self._starts:
                self._starts[position] = noise_of(self._request, position)
            start = self._starts[position]
            if start is None:
                break
            noise.append(start)
        return noise, self._masking.masks(context.tolist()) if self._masking else None

    def forced_tree(self, context: Tokens, budget: int) -> TokenTree:
        for origin, member in enumerate(self._members, len(_OWN)):
            if member.certain:
                tree = member.propose(context, budget)
                if len(tree) > 1:
                    return TokenTree.chain(tree.tokens, origin=origin)
        return TokenTree.root(int(context[-1]))

    def observe(self, step: Step) -> None:
        drawn = len(step.context) >= self._prompt
        if drawn:
            self._settle(step)
        for i, member in enumerate(self._members):
            if member.needs_hidden and self._rests(i):
                continue  # it begins anew with the states of its first pass
            if member.top_k and (drawn or member.learns_from_prompt):
                start = perf_counter()
                member.observe(step)
                if member.needs_hidden:
                    self._learning[i] = perf_counter() - start
        self._blend.observe(*step_arrays(step), drawn)

    def _settle(self, step: Step) -> None:
        """Record what members cost and gained, and which of them are asked next."""
        asked, self._asked = self._asked, _Asked()
        if not asked.at:
            return
        now, accepted = perf_counter(), len(step.path)
        passed = now - asked.at
        token = passed / accepted
        self._token += 0.05 * (token - self._token) if self._token else token
        credit: list[int] = []
        if asked.named:
            by_node = paths(step.tree)
            credit = [asked.named.get(by_node[node], 0) for node in step.path.tolist()]
        for i, worth in enumerate(self._worth):
            if i in asked.seconds:
                seconds = asked.seconds[i] + self._learning.pop(i, 0.0)
                worth.record(seconds, self._gained(i, asked, credit, step), self._token)
            worth.rest(passed, now)
        self.needs_hidden = any(member.needs_hidden for member in self._awake())

    def _gained(self, member: int, asked: _Asked, credit: list[int], step: Step) -> float:
        """Return the tokens of a pass that a member gained."""
        bit = 1 << member + len(_OWN)
        if not isinstance(self._members[member], ModelBacked) or asked.tree is None:
            return sum(1 / named.bit_count() for named in credit if named & bit)
        if asked.without is None:
            return 0.0
        drawn = step.drawn.tolist()
        sharing = sum(isinstance(self._members[i], ModelBacked) for i in asked.seconds)
        return (followed(*asked.tree, drawn) - followed(*asked.without, drawn)) / sharing

    def state(self) -> State:
        state = mixer_state(self._blend.mixer) | automata_state(self._blend.suffix)
        state["foresight"] = np.array(self._blend.draw_weights, np.float32)
        for i, member in enumerate(self._members):
            state |= {f"{i}.{name}": array for name, array in member.state().items()}
        return state

    def load(self, state: State) -> None:
        parts: list[State] = [{} for _ in self._members]
        own: State = {}
        for name, array in state.items():
            head, dot, tail = name.partition(".")
            if dot and head.isdecimal() and int(head) < len(parts):
                parts[int(head)][tail] = array
            else:
                own[name] = array
        mine = {name: own.pop(name) for name in automata_state(self._blend.suffix) if name in own}
        foresight = own.pop("foresight", None)
        load_mixer(self._blend.mixer, own, self._vocab_size)
        load_automata(self._blend.suffix, mine, self._method.reach, self._vocab_size)
        if foresight is not None:
            like = {"foresight": np.empty(4, np.float32)}
            checked("blend", {"foresight": foresight}, like, {"foresight": (-_LARGEST, _LARGEST)})
            self._blend.draw_weights = foresight.tolist()
        for member, part in zip(self._members, parts, strict=True):
            if part or member.state():
                member.load(part)

    def reset(self) -> None:
        self._blend.reset()
        for member in self._members:
            member.reset()
        self._forget()
        if self._start:
            self.load(self._start)
