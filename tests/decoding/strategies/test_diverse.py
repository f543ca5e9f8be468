import numpy as np
import pytest

from paceline.core import Request
from paceline.decoding.strategies.base import Task
from paceline.decoding.strategies.beam import Beam
from paceline.decoding.strategies.diverse import DiverseBeam
from paceline.errors import MethodError
from tests.decoding.strategies.conftest import log_probs
from tests.decoding.strategies.test_beam import Counting


def slow(engine, prompt, limit, groups, width, penalty):
    """Algorithm 1 of the paper over whole texts, without ends: (tokens, score) of every beam."""
    beams = [[((), 0.0)] for _ in range(groups)]
    for _ in range(limit):
        taken = np.zeros(engine.config.vocab_size)
        for group, texts in enumerate(beams):
            options = []
            for text, score in texts:
                row = log_probs(engine, [*prompt, *text])
                for token in np.argsort(-(row - penalty * taken), kind="stable")[:width]:
                    total = score + row[token]
                    options.append((total - penalty * taken[token], total, (*text, int(token))))
            options.sort(key=lambda option: -option[0])
            beams[group] = [(text, total) for _, total, text in options[:width]]
            for text, _ in beams[group]:
                taken[text[-1]] += 1
    return [text for texts in beams for text in texts]


@pytest.mark.parametrize("penalty", [0.3, 2.0])
def test_it_finds_what_the_papers_algorithm_finds(run, engine, prompts, penalty):
    settings = DiverseBeam(width=6, groups=3, returned=6, penalty=penalty)
    found = run(settings, Request(prompts[0], 8))
    expected = slow(engine, prompts[0], 8, 3, 2, penalty)
    expected.sort(key=lambda text: -text[1])
    assert [tuple(output.tokens) for output in found] == [text for text, _ in expected]
    scores = [score / 8 for _, score in expected]
    np.testing.assert_allclose([output.score for output in found], scores, atol=1e-6)


def test_one_group_is_beam_search(run, prompts):
    request = Request(prompts[1], 20, stop_tokens=frozenset({13}))
    one = run(DiverseBeam(width=4, groups=1, returned=4, penalty=3), request)
    beam = run(Beam(width=4, returned=4), request)
    assert [output.tokens for output in one] == [output.tokens for output in beam]


def test_groups_differ_more_with_a_penalty(run, prompts):
    def first_tokens(penalty):
        settings = DiverseBeam(width=4, groups=4, returned=4, penalty=penalty)
        return {output.tokens[0] for output in run(settings, Request(prompts[0], 5))}

    assert len(first_tokens(0)) == 1
    assert len(first_tokens(100)) == 4


def test_all_groups_share_a_pass_and_caches_are_bounded():
    engine = Counting()
    found = DiverseBeam(width=6, groups=3).run(Task(engine, Request((1, 2), 20)))
    assert found[0].passes == 20
    assert (engine.most, engine.opened) == (6, 0)
    engine = Counting(interrupt=7)
    assert DiverseBeam().run(Task(engine, Request((1, 2), 20)))[0].finish == "interrupted"
    assert engine.opened == 0


def test_groups_divide_the_width():
    with pytest.raises(MethodError, match="multiple of groups=3"):
        DiverseBeam(width=4, groups=3)
