"""Makes a plan: searches, verifies the best setups in turns, and chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from paceline.errors import RequestError
from paceline.planning.plan_file import PlanRow, SetupPlan
from paceline.planning.plan_search import Candidate, PlanSearch
from paceline.planning.setups import Setup
from paceline.planning.verification import Verification, Verified

RIVALS = 2
_CLOSE = 0.98  # share of the best speed from which a setup counts as equally fast
_CONFIRMED = 12  # candidates whose loss is measured as a whole, at most
_SHARE = 0.6  # of the free memory that verified models may take


@dataclass(frozen=True)
class PlanResult:
    """A plan with everything that a report shows.

    Attributes:
        plan: the chosen setup and its rivals.
        verified: what was run end to end, in the order of the plan's rows; empty if nothing was.
        candidates: every setup with a forecast, best first.
        left_out: what was not considered or not measured, with the reason.
        repeated: measurements that were made again since the machine was busy.
        busy: measurements that were made on a busy machine.
    """

    plan: SetupPlan
    verified: tuple[Verified, ...]
    candidates: tuple[Candidate, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    repeated: int = 0
    busy: int = 0


@dataclass
class Planner:
    """Makes the plan of one goal.

    Attributes:
        search: finds and ranks candidates.
        verification: runs the best ones; None runs none, and the plan rests on forecasts.
        fingerprint: identifies a checkpoint.
        free_bytes: memory that verified models may share; None: no limit.
        say: is given a line for the user.
    """

    search: PlanSearch
    verification: Verification | None
    fingerprint: Callable[[str], str]
    free_bytes: int | None = None
    say: Callable[[str], None] = lambda line: None

    def run(self) -> PlanResult:
        """Return the plan.

        Raises:
            RequestError: nothing reaches the goal; says what would be possible.
        """
        ranked = self.search.run()
        finalists = self._finalists(ranked)
        if not finalists:
            raise RequestError(self._impossible(self.search.beyond()))
        verified: list[Verified] = []
        if self.verification is not None:
            names = "; ".join(each.setup.title for each in finalists)
            self.say(f"running the best setups in turns: {names}")
            verified = self._chosen_first(self.verification.run(finalists))
            finalists = [each.candidate for each in verified]
        rows = [self._row(each, number, verified) for number, each in enumerate(finalists)]
        source, watch = self.search.source, self.search.lab.watch
        plan = SetupPlan(
            source.path,
            source.name,
            self.fingerprint(source.path),
            self.search.goal,
            tuple(rows),
        )
        return PlanResult(
            plan,
            tuple(verified),
            tuple(ranked),
            self._left_out(),
            watch.repeated,
            watch.busy,
        )

    def _finalists(self, ranked: Sequence[Candidate]) -> list[Candidate]:
        """Return the best candidates of different kinds, and the default setup if it fits."""
        found: list[Candidate] = []
        confirmed = 0
        goal, default = self.search.goal, self._default(ranked)
        for each in ranked:
            if len(found) > RIVALS + (default is None) or not each.fits(goal):
                break
            if any(_same_kind(each.setup, other.setup) for other in found):
                continue
            if not each.loss_measured and not each.exact and confirmed < _CONFIRMED:
                confirmed += 1
                each = self.search.confirm(each)
                if not each.fits(goal):
                    continue
            found.append(each)
        if default is not None and found:
            found = [each for each in found if each.setup != default.setup]
            found = self._within_memory([default, *found])
        return found

    def _default(self, ranked: Sequence[Candidate]) -> Candidate | None:
        """Return the candidate that runs without any options; None if it does not fit."""
        setup = Setup(self.search.source.path)
        fitting = (each for each in ranked if each.setup == setup)
        found = next(fitting, None)
        return found if found is not None and found.fits(self.search.goal) else None

    def _within_memory(self, found: list[Candidate]) -> list[Candidate]:
        """Return as many as can be open at once: the default, then from the best on."""
        if self.free_bytes is None:
            return found
        kept, total = found[:1], found[0].forecast.memory
        for each in found[1:]:
            if total + each.forecast.memory <= _SHARE * self.free_bytes or len(kept) < 2:
                kept.append(each)
                total += each.forecast.memory
        return kept

    def _chosen_first(self, verified: Sequence[Verified]) -> list[Verified]:
        """Return what was run, the best first: of equally fast ones the exact and small ones."""
        by_speed = sorted(verified, key=lambda each: -each.speed.value)
        if self.search.goal.prefer == "memory":
            return sorted(by_speed, key=lambda each: each.candidate.forecast.memory)
        fastest = by_speed[0].speed.value

        def key(each: Verified) -> tuple[bool, bool, int, int, float]:
            close = each.speed.value >= _CLOSE * fastest
            changes = len(each.candidate.setup.flags())
            memory = each.candidate.forecast.memory if close else 0
            return (
                not close,
                close and not each.candidate.exact,
                changes * close,
                memory,
                (-each.speed.value),
            )

        return sorted(by_speed, key=key)

    def _row(self, candidate: Candidate, number: int, verified: Sequence[Verified]) -> PlanRow:
        run = verified[number] if verified else None
        loss = candidate.loss
        return PlanRow(
            candidate.setup,
            self.fingerprint(candidate.setup.model),
            candidate.exact,
            candidate.forecast.memory,
            candidate.forecast.tokens_per_second,
            None if run is None else run.speed.value,
            None if run is None else run.speed.low,
            None if run is None else run.speed.high,
            candidate.forecast.first_token if run is None else run.first_token,
            None if loss is None else loss.value,
            None if loss is None else loss.error,
            _needs(candidate.setup, self.search.source.path),
        )

    def _left_out(self) -> dict[str, str]:
        from paceline.planning.candidates import left_out

        lab = self.search.lab
        unmeasured = dict.fromkeys(lab.unmeasured, "there was no time to measure it")
        failed = {} if self.verification is None else self.verification.failed
        return {**self.search.pruned, **lab.failed, **failed, **unmeasured, **left_out()}

    def _impossible(self, possible: Sequence[Candidate]) -> str:
        """Return why nothing reaches the goal, and what would."""
        goal, source = self.search.goal, self.search.source
        unit = "of the judge's score" if self.search.lab.judged else "nats a token"
        known = [each for each in possible if each.loss is not None and not each.predicted]
        known = known or [each for each in possible if each.loss is not None]
        smallest = min(known, key=lambda each: each.forecast.memory)
        within = [each for each in known if each.exact or _loss(each) <= goal.max_loss]
        context = self.search.prompts.context(goal)
        users = f" for {goal.users} users" if goal.users > 1 else ""
        bound = (
            "without any loss" if goal.exact else f"at a loss of at most {goal.max_loss:g} {unit}"
        )
        text = (
            f"{_megabytes(goal.memory or 0)} cannot hold {source.name} with {context} tokens"
            f"{users} {bound}: the smallest {'predicted' if smallest.predicted else 'measured'} is "
            f"{_described(smallest)}"
        )
        if within and smallest not in within:
            best = min(within, key=lambda each: each.forecast.memory)
            text += f", and within that loss {_described(best)}"
        unknown = [each for each in possible if each.loss is None and not each.exact]
        fitting = [each for each in unknown if each.forecast.memory <= (goal.memory or 0)]
        if fitting:  # the largest loses least
            most = max(fitting, key=lambda each: each.forecast.memory)
            size = _megabytes(most.forecast.memory)
            text += (
                f"; {most.setup.title} would take {size}, but its loss is not measured: the same "
                "command with more --minutes goes on"
            )
        return f"{text}; ask for more memory, more loss, a shorter context or fewer users"


def _loss(candidate: Candidate) -> float:
    return float("inf") if candidate.loss is None else candidate.loss.value


def _described(candidate: Candidate) -> str:
    size = _megabytes(candidate.forecast.memory)
    loss = "no loss" if candidate.exact else f"loss {_loss(candidate):.2g}"
    return f"{size} at {loss} ({candidate.setup.title})"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e6:.2g} MB"


def _same_kind(a: Setup, b: Setup) -> bool:
    """Return whether two setups differ in what is hardly a rival: cache format and threads."""
    kinds = [
        (each.model, each.format, each.drafter, each.kv_policy, each.attention, each.weights_memory)
        for each in (a, b)
    ]
    return kinds[0] == kinds[1]


def _needs(setup: Setup, model: str) -> str:
    needs = []
    if setup.model != model:
        needs.append(f"the checkpoint {setup.model}")
    if "path=" in setup.drafter:
        needs.append("the drafter's model")
    return ", ".join(needs) or "nothing else"
