"""PEARL: drafting goes on in another thread, and changes no token."""

import threading
from time import sleep

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.drafters.base import Target
from paceline.drafters.draft_model.tree_growth import GrowingTree
from paceline.drafters.model import Drafts
from paceline.engines.follower import Follower
from paceline.engines.native import NativeEngine
from paceline.errors import MethodError, ModelError
from paceline.models import load
from paceline.registry import drafters
from tests.conftest import shared
from tests.drafters.steps import check_tree
from tests.drafters.test_model import Near, drafting, request_at, run
from tests.toy import ToyEngine


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "paceline-pearl"]


def wait():
    for thread in threads():
        thread.join()


class Patient(ToyEngine):
    """A target that takes long enough for the draft to do all that it may."""

    def forward(self, batch, rows="all", view=None):
        wait()
        return super().forward(batch, rows, view)


class Counting(ToyEngine):
    """A draft that knows who asked it."""

    passes, ahead = 0, 0

    def forward(self, batch, rows="all", view=None):
        self.passes += 1
        self.ahead += threading.current_thread() is not threading.main_thread()
        return super().forward(batch, rows, view)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("target", [ToyEngine, Patient])
@pytest.mark.parametrize("chosen", [{}, {"head": 6}, {"wait": 3, "stop": "adaptive"}], ids=str)
def test_output_is_that_of_plain_decoding(temperature, target, chosen):
    drafter = drafting(schedule="pearl", **chosen)
    plain = drafters.parse("plain").build(Target(11))
    for seed in range(2):
        request = request_at(temperature, seed, prompt=(1, 2, 3 + seed))
        assert run(drafter, request, engine=target()).tokens == run(plain, request).tokens
    drafter.reset()
    assert not threads()


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(0, 0.002), min_size=4, max_size=4), st.integers(0, 99))
def test_however_the_threads_meet(pauses, seed):
    class Slow(ToyEngine):
        def forward(self, batch, rows="all", view=None):
            sleep(pauses[seed % 2])
            return super().forward(batch, rows, view)

    class SlowDraft(Near):
        def forward(self, batch, rows="all", view=None):
            sleep(pauses[2 + len(batch[0][1]) % 2])
            return super().forward(batch, rows, view)

    drafter = drafting(SlowDraft(), schedule="pearl")
    request = request_at(0.5, seed, length=12)
    plain = drafters.parse("plain").build(Target(11))
    assert run(drafter, request, engine=Slow()).tokens == run(plain, request).tokens
    drafter.reset()
    assert not threads()


def test_what_was_foreseen_is_proposed_without_waiting():
    draft = Counting()  # thinks what the target thinks
    drafter = drafting(draft, schedule="pearl", width=8)
    output = run(drafter, request_at(0.0), engine=Patient())
    assert output.accepted["model"] == 40 - output.passes
    assert output.passes < 16
    wait()
    assert draft.passes - draft.ahead == 2  # the prompt, and the first root


def test_a_wrong_draft_waits_for_one_pass_at_each_proposal():
    draft = Counting()
    right = draft.logits_after
    draft.logits_after = lambda tokens: -right(tokens)
    drafter = drafting(draft, schedule="pearl", width=1)
    output = run(drafter, request_at(0.0), budget=1, engine=Patient())
    assert "model" not in output.accepted
    assert draft.passes - draft.ahead == 1 + output.passes - 1  # the last needs no guess
    wait()


def test_it_waits_for_more_where_it_may():
    passes = {}
    for wait_for in (1, 4):
        draft = Counting()
        draft.logits_after = Near().logits_after
        drafter = drafting(draft, schedule="pearl", wait=wait_for)
        output = run(drafter, request_at(0.0), engine=Patient())
        passes[wait_for] = output.passes
        wait()
        assert draft.passes - draft.ahead <= 1 + wait_for * output.passes
    assert passes[4] <= passes[1]


def test_trees_are_valid_and_begin_at_the_context():
    drafter = drafting(schedule="pearl")
    random = np.random.default_rng(0)
    drafter.begin(request_at(0.0))
    context = [1, 2, 3]
    for _ in range(30):
        budget = int(random.integers(0, 12))
        tree = drafter.propose(np.array(context, np.int32), budget)
        check_tree(tree, context[-1], budget, 11)
        taken = random.integers(0, len(tree))
        path = []
        while taken > 0:
            path.append(int(tree.tokens[taken]))
            taken = tree.parents[taken]
        context += [*path[::-1], int(random.integers(0, 11))]
        context = context[:60] if len(context) < 60 else [1, 2, 3]
    drafter.reset()


def test_an_error_in_the_thread_comes_out_and_does_no_lasting_harm():
    class Breaking(ToyEngine):
        broken = True

        def forward(self, batch, rows="all", view=None):
            if self.broken and threading.current_thread() is not threading.main_thread():
                raise ModelError("the draft broke")
            return super().forward(batch, rows, view)

    draft = Breaking()
    drafter = drafting(draft, schedule="pearl")
    engine = Patient()
    with pytest.raises(ModelError, match="the draft broke"):
        run(drafter, request_at(0.0), engine=engine)
    assert engine.opened == 0
    assert not threads()
    draft.broken = False
    plain = drafters.parse("plain").build(Target(11))
    assert run(drafter, request_at(0.0)).tokens == run(plain, request_at(0.0)).tokens
    wait()
    draft.broken = True  # after the last proposal: the next request says so
    drafter.propose(np.array([1, 2], np.int32), 4)
    wait()
    with pytest.raises(ModelError, match="the draft broke"):
        drafter.begin(request_at(0.0))
    drafter.begin(request_at(0.0))


def test_threads_end_by_themselves():
    """Also behind an output that nobody reads to its end."""
    drafter = drafting(schedule="pearl", depth=64)
    for _ in range(20):
        drafter.begin(request_at(0.0))
        drafter.propose(np.array([1, 2, 3], np.int32), 64)
        assert len(threads()) <= 1
    wait()
    assert not threads()


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.lists(st.integers(0, 4), max_size=4))
def test_the_part_below_a_path_is_the_tree_that_would_grow_there(seed, passes, path):
    """Where everything is run, the probabilities below are those of a tree that began there."""

    def row(text):
        return np.random.default_rng([seed, *text]).dirichlet(np.ones(5)).astype(np.float32)

    def grown_from(prefix, passes):
        growing = GrowingTree((9, *prefix)[-1])
        asked = []

        def step(tree, fresh):
            texts = []
            for node, parent in enumerate(tree.parents):
                before = texts[parent] if node else list(prefix)[:-1]
                texts.append([*before, int(tree.tokens[node])] if node or prefix else [])
            asked.append(texts[-fresh:])
            return np.zeros((fresh, 5), np.float32)

        def judge(logits, depths):
            rows = np.stack([row(text) for text in asked[-1]])
            order = np.argsort(-rows, axis=1, kind="stable")
            return order.astype(np.int32), np.take_along_axis(rows, order, 1)

        for _ in range(passes):
            growing.step(growing.frontier(40, 3, 9), step, judge)
        return growing

    def reported(growing):
        """Path -> (score, whether it was run)."""
        growth = growing.growth(10**6)
        tree, texts = growth.tree, [()]
        for node in range(1, len(tree)):
            texts.append((*texts[tree.parents[node]], int(tree.tokens[node])))
        return {text: (float(tree.scores[n]), n in growth.rows) for n, text in enumerate(texts)}

    whole = grown_from((), passes)
    part = whole.below(path)
    everything = reported(whole)
    if part is None:
        assert tuple(path) not in everything
        return
    below = reported(part)
    start = tuple(path)
    expected = {t[len(start) :]: v for t, v in everything.items() if t[: len(start)] == start}
    expected[()] = (1.0, expected[()][1])
    assert below == expected
    assert part.begun() == expected[()][1]
    part.step(part.frontier(40, 3, 9), *fixed())


def fixed():
    """Passes that say nothing."""
    return (
        lambda tree, fresh: np.zeros((fresh, 5), np.float32),
        lambda logits, depths: (
            np.tile(np.arange(5, dtype=np.int32), (len(logits), 1)),
            np.full((len(logits), 5), 0.2, np.float32),
        ),
    )


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("schedule=never", "model:schedule is 'never', expected serial, pearl"),
        ("schedule=pearl,stop=depth", "does not use stop and threshold; leave them out"),
        ("schedule=pearl,threshold=0.5", "leave them out, or set wait above 1"),
        ("schedule=pearl,wait=0", "model:wait is 0"),
        ("wait=2", "leave wait out"),
    ],
)
def test_wrong_settings_are_refused(spec, said):
    with pytest.raises(MethodError, match=said):
        drafters.parse(f"model:path=a,{spec}")


def test_only_what_is_waited_for_takes_all_threads(monkeypatch):
    """Beside the target the draft has one."""
    seen, run_ = [], NativeEngine.forward

    def forward(engine, *words, **more):
        own = threading.current_thread() is threading.main_thread()
        seen.append((own, engine.threads))
        return run_(engine, *words, **more)

    monkeypatch.setattr(NativeEngine, "forward", forward)
    model = load(shared("models", "stories260K"))
    engine = NativeEngine(model.config, model.weights, threads=3)
    method = drafters.parse("model:path=toy,schedule=pearl,wait=3,threshold=0.0")
    drafter = Drafts(method, 512, [Follower(engine)])
    prompt = np.arange(1, 40, dtype=np.int32)
    drafter.begin(request_at(0.0))
    for end in (20, 39):
        drafter.follow(prompt[:end])
        drafter.propose(prompt[:end], 8)
        wait()
    drafter.release()
    assert set(seen) == {(True, 3), (False, 1)}


@pytest.mark.parametrize("schedule", ["serial", "pearl", "pearl,wait=3,stop=adaptive,depth=12"])
def test_a_target_that_streams_writes_what_plain_decoding_does(schedule, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target, draft = shared("models", "bitstories-1M"), shared("models", "stories260K")
    request = {"max_new_tokens": 60, "temperature": 0.7, "seed": 5, "ignore_eos": True}
    with LM(target, drafter="plain", threads=2) as lm:
        expected = lm.generate("One day, a dog", **request).tokens
    spec = f"model:path={draft},schedule={schedule}"
    with LM(target, drafter=spec, budget=12, threads=2, weights_memory="500KB") as lm:
        assert lm.engine.streamed_bytes > 0
        output = lm.generate("One day, a dog", **request)
    assert output.tokens == expected
    assert output.accepted["model"] > 0


def test_other_tokens_and_the_rejection_walk_are_refused():
    story = shared("models", "stories260K")
    tokenizer = load(shared("models", "tinystories-instruct-3m-chat")).tokenizer
    with pytest.raises(
        MethodError,
        match="model:schedule=pearl and a draft with another tokenizer do not go together",
    ):
        drafters.parse(f"model:path={story},schedule=pearl").build(Target(14019, None, tokenizer))
    assert not drafting(schedule="pearl").has_draft_probs
