"""GSM8K and MBPP, by a model that says what it is told to; programs run in the sandbox."""

import json
from decimal import Decimal

import pytest

from paceline.errors import MethodError, RequestError
from paceline.measuring.evaluation import mbpp
from paceline.measuring.evaluation.gsm8k import Gsm8k, final_number
from paceline.measuring.evaluation.mbpp import Mbpp, code_of, passes
from paceline.measuring.evaluation.run import evaluate, summary
from paceline.sandbox import SandboxLimits, check_sandbox
from tests.measuring.evaluation.scripted import Scripted


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("so 3.\n#### 18", 18),
        ("#### $1,200.00\nQuestion", 1200),
        ("#### -4", -4),
        ("#### 5 #### 6", 5),
        ("####\n7", None),
        ("the answer is 7", None),
        ("#### .5", Decimal("0.5")),
        ("#### none", None),
        ("", None),
    ],
)
def test_the_number_after_the_mark(answer, number):
    assert final_number(answer) == number


@pytest.fixture
def problems(tmp_path):
    rows = [
        {"question": f"What is {i} + {i}?", "answer": f"It is {i}+{i}.\n#### {2 * i:,}"}
        for i in range(498, 503)
    ]
    write(tmp_path / "test.jsonl", rows)
    write(tmp_path / "train.jsonl", [{**row, "question": "Train?"} for row in rows])
    return tmp_path


def test_right_numbers_are_counted(problems):
    suite = Gsm8k(problems, shots=2)
    lm = Scripted(lambda prompt: "#### 1004.0" if "502?" in prompt else "#### 1000")
    found = evaluate(suite, lm)
    assert [result["correct"] for result in found.results] == [0, 0, 1, 0, 1]
    assert summary(suite, found.results)["exact"]["value"] == 0.4
    assert all(prompt.count("Train?") == 2 for prompt in lm.prompts)
    assert lm.prompts[0].endswith("Question: What is 498 + 498?\nAnswer:")
    assert Gsm8k(problems, shots=2).settings(lm) == found.settings
    assert Gsm8k(problems, shots=2, seed=1).settings(lm) != found.settings


def test_problems_of_a_chat(problems):
    lm = Scripted(lambda messages: "#### 996" if "498" in messages[0]["content"] else "?")
    found = evaluate(Gsm8k(problems, chat=True, limit=2), lm)
    assert [result["correct"] for result in found.results] == [1, 0]
    assert "####" in lm.prompts[0][0]["content"]


def test_what_gsm8k_refuses(problems):
    with pytest.raises(RequestError, match="holds 5 problems, expected 6"):
        Gsm8k(problems, shots=6)
    with pytest.raises(RequestError, match="fewer --shots"):
        evaluate(Gsm8k(problems), Scripted(str, context=420))
    write(problems / "test.jsonl", [{"question": "?", "answer": "nothing"}])
    with pytest.raises(RequestError, match="problem 1 has no number"):
        Gsm8k(problems)


def test_an_interrupted_answer_is_none(problems):
    lm = Scripted(str)
    generate = lm.generate

    def stopped(*words, **options):
        outputs = generate(*words, **options)
        outputs[-1].finish = "cancelled"
        return outputs

    lm.generate = stopped
    with pytest.raises(KeyboardInterrupt):
        evaluate(Gsm8k(problems), lm)


def task(number, name="double"):
    return {
        "text": f"Write a function {name}.",
        "code": f"def {name}(x):\r\n    return 2 * x",
        "task_id": number,
        "test_list": [f"assert {name}(2) == 4", f"assert {name}(-1) == -2"],
        "test_setup_code": "",
    }


@pytest.fixture
def confined():
    try:
        check_sandbox()
    except MethodError as error:
        pytest.skip(str(error))


GOOD = "def double(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    ("code", "passed"),
    [
        (GOOD, True),
        ("import math\ndef double(x):\n    return int(math.fsum([x, x]))", True),
        ("def double(x):\n    return 4", False),
        ("def other(x):\n    return x", False),
        ("def double(x:", False),
        (GOOD + "raise SystemExit(0)", False),
        (GOOD + "import os\nos._exit(0)", False),
        ("open('file', 'w').write('x')\n" + GOOD, False),
        ("import socket\nsocket.socket()\n" + GOOD, False),
        ("import paceline\n" + GOOD, False),
        ("while True: pass", False),
        ("x = 'x' * (1 << 40)\n" + GOOD, False),
        ("\0", False),
        ("\ud800", False),
    ],
)
def test_programs_pass_that_reach_the_end_of_their_tests(confined, monkeypatch, code, passed):
    monkeypatch.setattr(mbpp, "_LIMITS", SandboxLimits(seconds=1.0))
    assert passes(task(11), code) is passed


def test_code_of_answers():
    block = "Here:\n```python\nx = 1\n```\nIt is `x`."
    assert code_of(block) == "x = 1\n"
    assert code_of("```\nx = 1\n```") == "x = 1\n"
    assert code_of("x = 1\n[DONE]\nmore") == "x = 1\n"
    assert code_of("x = 1") == "x = 1"


def test_solved_tasks_are_counted(confined, tmp_path):
    write(tmp_path / "mbpp.jsonl", [task(2), task(3), task(11), task(12, "twice"), task(600)])
    lm = Scripted(lambda prompt: f"```python\n{GOOD}```")
    suite = Mbpp(tmp_path, allow_code=True, shots=2)
    found = evaluate(suite, lm)
    assert [result["correct"] for result in found.results] == [1, 0]
    assert lm.prompts[0].count("[DONE]") == 2
    assert "\r" not in lm.prompts[0]
    chat = Mbpp(tmp_path, allow_code=True, chat=True, limit=1)
    assert evaluate(chat, lm).results[0]["correct"] == 1


def test_what_mbpp_refuses(confined, tmp_path):
    write(tmp_path / "mbpp.jsonl", [task(2), task(600)])
    with pytest.raises(RequestError, match="--allow-code"):
        Mbpp(tmp_path)
    with pytest.raises(RequestError, match="no task with an id of 11 to 510"):
        Mbpp(tmp_path, allow_code=True)
    write(tmp_path / "mbpp.jsonl", [task(11)])
    with pytest.raises(RequestError, match="holds 0 examples, expected 3"):
        Mbpp(tmp_path, allow_code=True)
    for field, value in (("test_list", []), ("test_list", "x"), ("task_id", "11"), ("code", None)):
        write(tmp_path / "mbpp.jsonl", [{**task(11), field: value}])
        with pytest.raises(RequestError, match=f"as '{field}'"):
            Mbpp(tmp_path, allow_code=True, shots=0)
