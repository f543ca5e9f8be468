"""A prompt with documents: which cache it gets, and that nothing else changes its output."""

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
from paceline.documents.assembly import Documents
from paceline.documents.chunk_cache import ChunkCache
from paceline.documents.dependence import recomputed_runs
from paceline.drafters.base import Target
from paceline.engines import open_engine
from paceline.models import load
from paceline.models.vocabulary import Vocabulary
from paceline.registry import drafters
from tests.conftest import shared

TEXTS = (
    "Tom had a big red ball. He liked to play with the ball in the park every day.",
    "Lily was a little girl with a cat named Max. Max was black and very fast.",
    "Once upon a time, there was a dog who wanted to fly. The dog was sad.",
)
QUESTION = "Lily and Tom went to the park. Max"
DRAFTERS = ("hostile", "recycle", "lookup", "suffix", "blend", "layer_skip:skip=1+2", "lookahead")


class Setting:
    """An engine, a prompt with documents, and what plain decoding gives over it."""

    def __init__(self, name: str, kv_format: str = "auto") -> None:
        self.model = load(shared("models", "stories260K"))
        self.engine = open_engine(self.model, name, kv_format=kv_format)
        encode = self.model.tokenizer.encode
        self.before, self.after = [1], encode(QUESTION, False)
        self.documents = [encode(text, False) for text in TEXTS]
        self.vocabulary = Vocabulary(
            self.engine.config.vocab_size, self.model.tokenizer, lambda: None
        )
        self.plain = cache(lambda *key: self.output(*key, "plain", 0, ChunkCache()))

    def request(self, recompute: float, temperature: float, chunks: ChunkCache) -> Request:
        prompt = [*self.before, *(t for each in self.documents for t in each), *self.after]
        documents = Documents(
            len(self.before), tuple(map(len, self.documents)), (1,), recompute, chunks
        )
        request = Request(tuple(prompt), 30, temperature=temperature, seed=3, documents=documents)
        return bind([Temperature(temperature)] if temperature else [], request, self.vocabulary)

    def output(self, recompute, temperature, drafter, nodes, chunks) -> list[int]:
        request = self.request(recompute, temperature, chunks)
        target = Target(self.engine.config.vocab_size, self.engine, self.model.tokenizer)
        built = drafters.parse(drafter).build(target)
        tokens = Generation(self.engine, built, request, Fixed(nodes)).run().tokens
        assert self.engine.memory.used == 0
        return tokens

    def logits(self, recompute: float, chunks: ChunkCache, chunk: int = 256) -> np.ndarray:
        """The logits behind the prompt, whose parts have up to `chunk` tokens."""
        drafter = drafters.parse("plain").build(Target(self.engine.config.vocab_size, self.engine))
        session = Session(self.engine, drafter, self.request(recompute, 0.0, chunks))
        session.open()
        session.load_documents()
        while session.missing:
            tree = session.next_part(chunk)
            self.engine.forward([(session.active, tree)], "none")
            session.commit_part(tree, None)
            session.load_documents()
        logits = self.engine.forward([(session.sequence, session.propose(0))])[0].copy()
        session.close()
        assert self.engine.memory.used == 0
        return logits


@pytest.fixture(scope="module", params=["native", "reference"])
def setting(request):
    pytest.importorskip("torch").set_num_threads(1)
    return Setting(request.param)


def test_documents_do_not_see_each_other_and_the_question_sees_all(setting) -> None:
    from tests.documents.oracle import apart

    expected = apart(setting.model, setting.before, setting.documents, setting.after, (1,))
    found = setting.logits(0.0, ChunkCache())
    np.testing.assert_allclose(found, expected, atol=2e-3)
    whole = setting.engine.start(np.array(setting.request(0, 0, ChunkCache()).prompt, np.int32))
    setting.engine.release(whole)


def test_what_is_computed_again_sees_everything_before(setting, monkeypatch) -> None:
    from tests.documents.oracle import apart

    chosen = [[], [(0, 8), (12, 15)], [(3, 11)]]
    sizes = [len(each) for each in setting.documents]
    monkeypatch.setattr(
        "paceline.documents.assembly.recomputed_runs",
        lambda scores, share: list(chosen[sizes.index(len(scores))]),
    )
    assert len(set(sizes)) == 3
    parts = setting.before, setting.documents, setting.after, (1,)
    found = setting.logits(0.3, ChunkCache())
    np.testing.assert_allclose(found, apart(setting.model, *parts, chosen), atol=2e-3)
    assert np.abs(found - apart(setting.model, *parts)).max() > 0.02


def test_everything_computed_again_is_the_prompt_as_a_whole(setting) -> None:
    """But for the first document, whose sink is the same token that the prompt begins with."""
    prompt = np.array(setting.request(0.0, 0.0, ChunkCache()).prompt, np.int32)
    sequence = setting.engine.start(prompt[:-1])
    from paceline.core import TokenTree

    whole = setting.engine.forward([(sequence, TokenTree.root(int(prompt[-1])))])[0].copy()
    setting.engine.release(sequence)
    np.testing.assert_allclose(setting.logits(1.0, ChunkCache()), whole, atol=2e-3)
    assert np.abs(setting.logits(0.0, ChunkCache()) - whole).max() > 0.02


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_drafting_and_stored_chunks_change_nothing(setting, data) -> None:
    key = data.draw(st.sampled_from((0.0, 0.2))), data.draw(st.sampled_from((0.0, 0.8)))
    drafter, nodes = data.draw(st.sampled_from(DRAFTERS)), data.draw(st.sampled_from((1, 4, 13)))
    expected = setting.plain(*key)
    chunks = ChunkCache()
    if setting.engine.name == "native":
        setting.engine.threads = data.draw(st.integers(1, 2))
    assert setting.output(*key, drafter, nodes, chunks) == expected
    assert chunks.statistics.misses == len(TEXTS)
    assert setting.output(*key, drafter, nodes, chunks) == expected
    assert chunks.statistics.memory_hits == len(TEXTS)


@pytest.mark.parametrize("kv_format", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("recompute", [0.0, 0.2])
def test_a_stored_chunk_gives_the_bits_of_a_fresh_one(kv_format, recompute) -> None:
    setting = Setting("native", kv_format)
    chunks = ChunkCache()
    fresh = setting.logits(recompute, chunks)
    assert chunks.statistics.misses == len(TEXTS)
    np.testing.assert_array_equal(setting.logits(recompute, chunks), fresh)
    assert chunks.statistics.misses == len(TEXTS)
    for chunk in (1, 5):
        np.testing.assert_array_equal(setting.logits(recompute, ChunkCache(), chunk), fresh)


def test_runs_hold_the_share_that_was_asked_for() -> None:
    scores = np.zeros(100, np.float32)
    scores[[17, 18, 60]] = 1, 1, 5
    assert recomputed_runs(scores, 0.0, 8) == []
    assert recomputed_runs(scores, 0.01, 8) == [(56, 64)]
    assert recomputed_runs(scores, 0.16, 8) == [(16, 24), (56, 64)]
    assert recomputed_runs(scores, 1.0) == [(0, 100)]
