"""Stories in long contexts: answers follow from the facts, and the facts stand in their order."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import RequestError
from paceline.lm import LM
from paceline.measuring.evaluation.babilong import StoryContexts
from paceline.measuring.evaluation.plan import SuiteSettings
from paceline.measuring.evaluation.run import evaluate, group_summary
from paceline.measuring.evaluation.story_tasks import STORIES
from tests.conftest import shared
from tests.measuring.evaluation.test_long_context import BOOK

GO = re.compile(r"(\w+) (?:went to|walked into|moved to) the (\w+)\.")
TAKE = re.compile(r"(\w+) (?:took|picked up) the (\w+)\.")
DROP = re.compile(r"(\w+) (?:put down the (\w+)|left the (\w+) there)\.")


def read(facts):
    """Return where people are, and where each thing was, of a story's sentences alone."""
    rooms, held, seen = {}, {}, {}

    def note(thing):
        places = seen.setdefault(thing, [])
        place = rooms[held[thing]]
        if not places or places[-1] != place:
            places.append(place)

    for fact in facts:
        if match := GO.fullmatch(fact):
            assert rooms.get(match[1]) != match[2], "who moves goes elsewhere"
            rooms[match[1]] = match[2]
            for thing in [each for each, who in held.items() if who == match[1]]:
                note(thing)
        elif match := TAKE.fullmatch(fact):
            assert match[2] not in held
            assert match[2] not in seen or seen[match[2]][-1] == rooms[match[1]], "it lies there"
            held[match[2]] = match[1]
            note(match[2])
        else:
            match = DROP.fullmatch(fact)
            assert held.pop(match[2] or match[3]) == match[1]
    return rooms, seen


@given(kind=st.sampled_from(sorted(STORIES)), seed=st.integers(0, 10**6))
def test_answers_follow_from_the_facts(kind, seed):
    story = STORIES[kind](np.random.default_rng(seed))
    rooms, seen = read(story.facts)
    assert story.questions
    for each in story.questions:
        words = re.findall(r"\w+", each.text)
        if kind == "place":
            assert each.answer == rooms[words[2]]
            assert each.lead == f"{words[2]} is in the"
        elif kind == "presence":
            assert each.answer == ("yes" if rooms[words[1]] == words[-1] else "no")
        elif kind == "thing":
            assert each.answer == seen[words[-1]][-1]
        else:
            assert [each.answer, words[-1]] == seen[words[3]][-2:]
    assert STORIES[kind](np.random.default_rng(seed)) == story


def test_half_of_the_people_are_where_it_is_asked():
    told = [STORIES["presence"](np.random.default_rng(seed)) for seed in range(200)]
    answers = [each.answer for story in told for each in story.questions]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "books.jsonl").write_text(json.dumps({"text": BOOK}) + "\n")
    return StoryContexts(tmp_path, limit=2, length=384)


@pytest.fixture(scope="module")
def lm():
    return LM(shared("models", "stories260K"), drafter="plain", budget=1)


def test_contexts_hold_the_facts_in_their_order(lm, suite):
    for item in suite.items:
        context = suite.context(lm, item)
        assert len(context.tokens) == 384
        text = lm.tokenizer.decode(context.tokens)
        rooms, seen = read(
            re.findall(r"[A-Z]\w+ (?:went|walk|mov|t[o]ok|pick|put|left)[^.]*\.", text)
        )
        for question in context.questions:
            assert question.tokens[0] == context.questions[0].tokens[0]
            asked = lm.tokenizer.decode(question.tokens[1:])
            answer = asked.split()[-1]
            if "Where is the " in asked:
                assert answer == seen[re.search(r"Where is the (\w+)", asked)[1]][-1]
            elif "Where is " in asked:
                assert answer == rooms[re.search(r"Where is (\w+)", asked)[1]]
            elif "before" in asked:
                assert answer == seen[re.search(r"was the (\w+)", asked)[1]][-2]
            else:
                who, room = re.search(r"Is (\w+) in the (\w+)", asked).groups()
                assert (answer == "yes") == (rooms[who] == room)
        assert suite.context(lm, item) == context


def test_stories_are_scored_by_kind_and_under_policies(lm, suite):
    found = evaluate(suite, lm)
    groups = group_summary(suite, found.results)
    assert set(groups) == set(STORIES)
    assert groups["place"]["metrics"]["gain kept"]["value"] == 1.0
    bounded = LM(lm.model.path, drafter="plain", budget=1, kv_policy="sliding_window:budget=128")
    kept = group_summary(suite, evaluate(suite, bounded).results)
    assert kept["place"]["metrics"]["gain kept"]["value"] != 1.0


def test_the_command_takes_stories(tmp_path):
    settings = SuiteSettings(suite=["babilong"], data=tmp_path, context=500)
    settings.check()
    settings.check_policy()
    with pytest.raises(RequestError, match=r"holds|no "):
        settings.make("babilong")
