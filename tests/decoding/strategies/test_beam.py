import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from paceline.control.bad_words import BadWords
from paceline.control.base import bind
from paceline.control.capabilities import RunsModel
from paceline.control.mirostat import Mirostat
from paceline.control.temperature import Temperature
from paceline.core import Request
from paceline.decoding.strategies.base import Task
from paceline.decoding.strategies.beam import Beam
from paceline.decoding.strategies.hypotheses.scores import best
from paceline.decoding.text_stream import TextStream
from paceline.errors import MethodError, RequestError
from paceline.models.vocabulary import Vocabulary
from tests.decoding.strategies.conftest import log_probs
from tests.decoding.test_text_stream import Letters
from tests.toy import ToyEngine

SETTINGS = [
    Beam(),
    Beam(width=3, returned=3, length_penalty=0.0),
    Beam(width=5, returned=2, length_penalty=2.0, early_stopping="never"),
    Beam(width=3, returned=2, early_stopping="true"),
    Beam(width=1, length_penalty=-1.0),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("limit", "ends"), [(30, {2}), (40, {13}), (25, {13, 426})])
def test_the_outputs_are_those_of_transformers(run, theirs, prompts, settings, limit, ends):
    import torch

    stopping = {"true": True, "false": False, "never": "never"}[settings.early_stopping]
    for prompt in prompts if settings.width > 1 else ():
        found = run(settings, Request(prompt, limit, stop_tokens=frozenset(ends)))
        expected = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=limit,
            num_beams=settings.width,
            num_return_sequences=settings.returned,
            length_penalty=settings.length_penalty,
            early_stopping=stopping,
            eos_token_id=sorted(ends),
            pad_token_id=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for output, text in zip(found, expected.sequences.tolist(), strict=True):
            text = text[len(prompt) :]
            assert text[: len(output.tokens)] == output.tokens
            assert set(text[len(output.tokens) :]) <= {3}
            assert output.finish == ("stop" if output.tokens[-1] in ends else "length")
        scores = [output.score for output in found]
        np.testing.assert_allclose(scores, expected.sequences_scores, atol=1e-4)


def test_a_beam_of_one_is_greedy(run, prompts, engine):
    (output,) = run(Beam(width=1), Request(prompts[0], 12))
    tokens = list(prompts[0])
    for token in output.tokens:
        assert token == log_probs(engine, tokens).argmax()
        tokens.append(token)


@hypothesis(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(2, 4))
def test_a_wide_enough_beam_finds_the_likeliest_text(seed, first, length):
    """Against all texts of a toy model with 4 tokens."""
    engine = ToyEngine(vocab_size=4, order=2)
    prompt = (first % 4, seed % 4)
    wide = Beam(width=4**length, returned=3, length_penalty=0.0)
    found = wide.run(Task(engine, Request(prompt, length)))
    texts = [((), 0.0)]
    for _ in range(length):
        texts = [
            ((*text, token), score + prob)
            for text, score in texts
            for token, prob in enumerate(log_probs(engine, [*prompt, *text]))
        ]
    expected = heapq.nlargest(3, texts, key=lambda text: text[1])
    assert [tuple(output.tokens) for output in found] == [text for text, _ in expected]
    np.testing.assert_allclose([o.score for o in found], [s for _, s in expected], atol=1e-9)
    assert engine.opened == 0


def test_controls_apply_to_every_hypothesis_and_dead_ones_die(stories, engine, prompts):
    vocabulary = Vocabulary(engine.config.vocab_size, stories.tokenizer)
    plain = Request(prompts[0], 20)
    settings = Beam(width=4, returned=4)
    free = settings.run(Task(engine, plain))
    assert any("Lily" in stories.tokenizer.decode(output.tokens) for output in free)
    request = bind([BadWords('"Lily"')], plain, vocabulary)
    for output in settings.run(Task(engine, request)):
        assert "Lily" not in stories.tokenizer.decode(output.tokens)
        score = sum(
            log_probs(engine, [*prompts[0], *output.tokens[:i]])[token]
            for i, token in enumerate(output.tokens)
        )
        assert output.score == pytest.approx(score / 20)


class Nothing:
    def apply(self, logits, history):
        return np.full_like(logits, -np.inf) if len(history) > 4 else logits


class Guide(Nothing):
    def run_tree(self, *words):
        raise AssertionError("asked after all")

    begin = lag = follow = positions = release = run_tree


def test_what_cannot_be_searched_is_refused_and_nothing_stays_open():
    engine = ToyEngine()
    with pytest.raises(RequestError, match="allow no token at position 5"):
        Beam().run(Task(engine, Request((1, 2), 9, controls=(Nothing(),))))
    assert engine.opened == 0
    warm = Request((1, 2), 9, 0.5, controls=(Temperature(0.5),))
    with pytest.raises(
        RequestError, match="the strategy beam do not go together: the strategy draws nothing"
    ):
        Beam().run(Task(engine, warm))
    with pytest.raises(RequestError, match="a prediction and the strategy beam do not go together"):
        Beam().run(Task(engine, Request((1, 2), 9, prediction=(1,))))
    assert isinstance(Guide(), RunsModel)
    with pytest.raises(MethodError, match="several texts; leave the guide out"):
        Beam().run(Task(engine, Request((1, 2), 9, controls=(Guide(),))))
    with pytest.raises(RequestError, match="nothing to mark"):
        Beam().run(Task(engine, Request((1, 2), 9, noise=lambda position: 1)))
    with pytest.raises(MethodError, match="strategies know one walk"):
        Beam().run(Task(engine, Request((1, 2), 9, walk="rejection")))
    steered = bind([Mirostat()], Request((1, 2), 9), None)
    with pytest.raises(MethodError, match="mirostat"):
        Beam().run(Task(engine, steered))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "1 to 1024"),
        ({"width": 2, "returned": 3}, "1 to 2"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"early_stopping": "perhaps"}, "true, false, never"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(MethodError, match=message):
        Beam(**settings)


class Counting(ToyEngine):
    """Remembers the most sequences at once; Ctrl-C comes at one pass."""

    def __init__(self, interrupt=-1, **options):
        super().__init__(**options)
        self.interrupt, self.passes, self.most = interrupt, 0, 0

    def forward(self, batch, rows="all"):
        self.passes += 1
        self.most = max(self.most, self.opened)
        if self.passes == self.interrupt:
            raise KeyboardInterrupt
        return super().forward(batch, rows)


def test_never_more_caches_than_hypotheses():
    engine = Counting()
    Beam(width=5).run(Task(engine, Request((1, 2), 30)))
    assert (engine.most, engine.opened) == (5, 0)


@hypothesis(deadline=None, max_examples=30)
@given(st.integers(1, 12))
def test_an_interrupted_search_gives_what_there_is_and_releases_all(at):
    engine = Counting(interrupt=at)
    found = Beam(width=3, returned=2).run(Task(engine, Request((1, 2), 8)))
    assert engine.opened == 0
    whole = Beam(width=3, returned=2).run(Task(ToyEngine(), Request((1, 2), 8)))
    # One pass is the prefill, then one for each token.
    if at <= 9:
        assert {output.finish for output in found} <= {"interrupted"}
        assert all(len(output.tokens) == at - 2 for output in found)
    else:
        assert [output.tokens for output in found] == [output.tokens for output in whole]


def test_stop_strings_end_hypotheses():
    engine = ToyEngine()
    free = Beam(width=3).run(Task(engine, Request((1, 2), 12)))[0]
    text = "".join(chr(token) for token in free.tokens)
    stop = text[4:6]
    request = Request((1, 2), 12, stop_strings=(stop,))
    task = Task(engine, request, lambda: TextStream(Letters(), (stop,)))
    for output in Beam(width=3, returned=3).run(task):
        letters = "".join(chr(token) for token in output.tokens)
        assert stop not in output.text
        assert letters.startswith(output.text)
        assert (output.finish == "stop") == (stop in letters)
        assert letters.find(stop) in (-1, len(letters) - len(stop))


@hypothesis(deadline=None, max_examples=30)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 40))
def test_best_is_a_stable_sort(values, count):
    scores = np.array(values, np.float64)
    scores[scores == -3] = -np.inf
    expected = [i for i in np.argsort(-scores, kind="stable") if np.isfinite(scores[i])]
    assert best(scores, count).tolist() == expected[:count]
