import json
from collections import Counter

import pytest

from paceline.errors import RequestError
from paceline.measuring.suites import SUITES, read_tasks
from tests.conftest import shared


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "question.jsonl"
    kinds = ["writing", "coding", "qa", "rag", "qa"]
    path.write_text("\n".join(json.dumps({"turns": ["Say"], "category": kind}) for kind in kinds))
    return path


def count(dialogues):
    return Counter(dialogue.category for dialogue in dialogues)


def test_a_suite_groups_its_categories(questions):
    assert count(read_tasks(questions, suite="spec-bench")) == {"mt_bench": 2, "qa": 2, "rag": 1}
    assert count(read_tasks(questions)) == {"writing": 1, "coding": 1, "qa": 2, "rag": 1}


def test_the_limit_counts_for_each_task(questions):
    found = read_tasks(questions, 1, "spec-bench")
    assert [(one.line, one.category) for one in found] == [(1, "mt_bench"), (3, "qa"), (4, "rag")]
    assert len(read_tasks(questions, 1)) == 1


def test_tasks_are_chosen_by_name(questions):
    assert count(read_tasks(questions, None, "spec-bench", ["mt_bench"])) == {"mt_bench": 2}
    assert count(read_tasks(questions, None, None, ["rag", "coding"])) == {"coding": 1, "rag": 1}


@pytest.mark.parametrize(
    ("suite", "tasks", "said"),
    [
        ("spec-banch", [], "no suite 'spec-banch'; known: spec-bench"),
        ("spec-bench", ["writing"], "no task 'writing'; it has mt_bench, qa, rag"),
        (None, [""], "no task ''; it has writing, coding, qa, rag"),
    ],
)
def test_unknown_names_are_refused(questions, suite, tasks, said):
    with pytest.raises(RequestError, match=said):
        read_tasks(questions, None, suite, tasks)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"prompt": "One", "category": "qa"}\n{"prompt": "Two", "category": "poems"}')
    with pytest.raises(RequestError, match="line 2 has the category 'poems'"):
        read_tasks(path, suite="spec-bench")


def test_the_real_questions_have_six_tasks():
    found = read_tasks(shared("data", "spec-bench", "question.jsonl"), suite="spec-bench")
    assert count(found) == dict.fromkeys(SUITES["spec-bench"], 40)
    assert sum(len(dialogue.turns) for dialogue in found) == 280
