"""Under a KV policy the output is that of plain decoding under it, whatever drafts and batches."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.control.base import bind
from paceline.control.temperature import Temperature
from paceline.core import Request
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.decoding.session import Session
from paceline.drafters.base import Target
from paceline.engines import open_engine
from paceline.kvcache.base import parse_policy
from paceline.models import load
from paceline.models.vocabulary import Vocabulary
from paceline.registry import drafters, kv_policies
from tests.conftest import shared

POLICIES = (  # every one that is registered, with a small budget
    *(kind.examples[1] for kind in kv_policies.methods().values()),
    "sliding_window:budget=10,sinks=1,every=5",
    "h2o:budget=9,recent=2,sinks=1,every=3",
    "adakv:budget=20,recent=4,every=5,of=sirllm",
)
DRAFTERS = (
    "hostile",
    "recycle",
    "token_recycling",
    "lookup",
    "suffix",
    "blend",
    "lookahead_trie",
    "lookahead",
    "layer_skip:skip=1+2",
)
PROMPTS = (
    "Once upon a time, there was a little girl named Lily. She loved to play in the park. Once",
    "Tom had a dog",
)


class Setting:
    """An engine, and what plain decoding under a policy gives in it."""

    def __init__(self, name: str) -> None:
        self.model = load(shared("models", "stories260K"))
        self.engine = open_engine(self.model, name)
        self.prompts = [tuple(self.model.tokenizer.encode(text)) for text in PROMPTS]
        self.vocabulary = Vocabulary(
            self.engine.config.vocab_size, self.model.tokenizer, lambda: None
        )
        self.plain = cache(lambda *key: self.output(*key, "plain", 0))

    def output(
        self, policy: str, prompt: int, temperature: float, drafter: str, nodes: int
    ) -> list[int]:
        request = self.request(policy, prompt, temperature)
        tokens = Generation(self.engine, self.drafter(drafter), request, Fixed(nodes)).run().tokens
        assert self.engine.memory.used == 0
        return tokens

    def request(self, policy: str, prompt: int, temperature: float) -> Request:
        request = Request(
            self.prompts[prompt],
            50,
            temperature=temperature,
            seed=7,
            kv_policy=parse_policy(policy) if policy else None,
        )
        return bind([Temperature(temperature)] if temperature else [], request, self.vocabulary)

    def drafter(self, name: str):
        target = Target(self.engine.config.vocab_size, self.engine, self.model.tokenizer)
        return drafters.parse(name).build(target)

    def together(self, sessions: list[Session], nodes: list[int], chunk: int) -> list[list[int]]:
        """Run requests in the same passes, each at its own place."""
        for session in sessions:
            session.open()
        while running := [each for each in sessions if not each.done]:
            parts = [bool(each.missing) for each in running]
            trees = [
                each.next_part(chunk) if part else each.propose(nodes[sessions.index(each)])
                for each, part in zip(running, parts, strict=True)
            ]
            rows = [
                each.wants_prefill_logits if part else True
                for each, part in zip(running, parts, strict=True)
            ]
            batch = [(each.sequence, tree) for each, tree in zip(running, trees, strict=True)]
            sizes = [len(tree) * want for tree, want in zip(trees, rows, strict=True)]
            logits = np.split(self.engine.forward(batch, rows).copy(), np.cumsum(sizes)[:-1])
            for each, tree, part, own in zip(running, trees, parts, logits, strict=True):
                if part:
                    each.commit_part(tree, own if len(own) else None)
                    continue
                walked = each.verify(tree, own)
                each.learn(tree, own, walked)
                each.accept(tree, walked)
        for session in sessions:
            session.close()
        assert self.engine.memory.used == 0
        return [session.output.tokens for session in sessions]


@pytest.fixture(scope="module", params=["native", "reference"])
def setting(request):
    if request.param == "reference":
        pytest.importorskip("torch").set_num_threads(1)
    return Setting(request.param)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_law(setting, data) -> None:
    """A policy with any drafter, chunk, batch and threads gives what it gives in plain decoding."""
    sessions, nodes, expected = [], [], []
    if setting.engine.name == "native":
        setting.engine.threads = data.draw(st.integers(1, 2))
    for _ in range(data.draw(st.integers(1, 3))):
        key = (
            data.draw(st.sampled_from(POLICIES)),
            data.draw(st.integers(0, 1)),
            data.draw(st.sampled_from((0.0, 0.8))),
        )
        expected.append(setting.plain(*key))
        drafter = setting.drafter(data.draw(st.sampled_from(DRAFTERS)))
        nodes.append(data.draw(st.sampled_from((0, 1, 4, 13))))
        sessions.append(Session(setting.engine, drafter, setting.request(*key)))
    assert setting.together(sessions, nodes, data.draw(st.sampled_from((1, 5, 256)))) == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_drafts_as_it_decodes(setting, policy: str) -> None:
    """What the test above draws, once for each policy."""
    assert setting.output(policy, 0, 0.0, "token_recycling", 13) == setting.plain(policy, 0, 0.0)


def test_a_policy_changes_the_output_and_a_large_budget_does_not(setting) -> None:
    """Else the tests above would prove nothing."""
    full = setting.plain("", 0, 0.0)
    assert any(setting.plain(policy, 0, 0.0) != full for policy in POLICIES)
    assert setting.plain("h2o:budget=512", 0, 0.0) == full
    assert setting.plain("sliding_window:budget=512", 0, 0.0) == full


@pytest.mark.parametrize("policy", POLICIES)
def test_chunks_end_where_the_policy_acts(setting, policy: str) -> None:
    """The prompt's rows are those of a prompt that is run token by token."""
    engine, chosen = setting.engine, parse_policy(policy)
    prompt = np.array(setting.prompts[0], np.int32)
    sequences = []
    for chunk in (1, 4, 256):
        sequence = engine.open()
        chosen.begin(engine, sequence)
        while (start := sequence.length) < len(prompt):
            size = min(chunk, chosen.distance(start))
            engine.extend(sequence, prompt[start : start + size])
            chosen.act(engine, sequence)
        sequences.append(sequence)
    for index in range(len(engine.config.layers)):
        first, *others = [engine.rows(sequence, index) for sequence in sequences]
        assert first.shape[1] <= chosen.max_rows(len(prompt))
        assert (first >= 0).any(1).all()
        for rows in others:
            np.testing.assert_array_equal(rows, first)
    for sequence in sequences:
        engine.release(sequence)


def test_without_a_policy_nothing_is_tracked_or_evicted(setting, monkeypatch) -> None:
    """Off means the plain path."""
    for name in ("track_attention", "attention_mass", "evict", "rows"):
        monkeypatch.setattr(setting.engine, name, None)  # to call it would be an error
    for drafter in ("plain", "recycle"):
        assert setting.output("", 1, 0.8, drafter, 8) == setting.output("", 1, 0.8, "plain", 0)
