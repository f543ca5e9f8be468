import ast
import re
from pathlib import Path

import pytest

import paceline
from paceline.abilities import Ability
from paceline.compatibility import ENGINE_ABILITIES, RULES, Side, check, check_needs
from paceline.errors import CombinationError, MethodError, RequestError

PACKAGE = Path(paceline.__file__).parent


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_names_both_sides_and_the_reason(rule):
    with pytest.raises(CombinationError) as caught:
        check({rule.a: "this one", rule.b: "that one"})
    said = str(caught.value)
    assert said == f"this one and that one do not go together: {rule.reason}; {rule.advice}"
    check({rule.a: "this one"})
    check({rule.b: "that one"})


def test_a_combination_that_no_rule_names_passes():
    pairs = {frozenset((rule.a, rule.b)) for rule in RULES}
    assert len(pairs) == len(RULES)
    for a in Side:
        for b in Side:
            if a != b and frozenset((a, b)) not in pairs:
                check({a: "a", b: "b"})


@pytest.mark.parametrize("ability", ENGINE_ABILITIES)
def test_an_engine_without_an_ability_is_refused_to_what_needs_it(ability):
    with pytest.raises(MethodError, match=f"needs an engine that can {ENGINE_ABILITIES[ability]}"):
        check_needs("the drafter x", {ability}, "old", set(Ability) - {ability})
    check_needs("the drafter x", {ability}, "new", {ability})
    check_needs("the drafter x", {Ability.TORCH}, "old", set())


def test_a_refusal_is_of_either_kind():
    assert issubclass(CombinationError, MethodError)
    assert issubclass(CombinationError, RequestError)


def sides_in_code():
    """Names of sides that some module states, besides the table itself."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        if file.name != "compatibility.py":
            found |= set(re.findall(r"\bSide\.([A-Z_]+)", file.read_text()))
    return found


def test_every_side_is_stated_by_code_and_is_part_of_a_rule():
    ruled = {side.name for rule in RULES for side in (rule.a, rule.b)}
    assert sides_in_code() == ruled == {side.name for side in Side}


REFUSAL = re.compile(
    r"do not go together|leave one of them out|has no use for|leave (?!it )\S+ out"
)
# Refusals of settings within one method or one option, not of a combination.
SETTINGS = {
    "cli/compress.py", "cli/decode_options.py", "cli/files.py", "compress/pipeline.py",
    "compress/budget/around.py", "compress/budget/level_recipes.py",
    "compress/prune/base.py", "compress/quantize/gguf.py",
    "compress/quantize/nupes.py",
    "compress/recipe.py", "compress/recipe_checks.py",
    "measuring/evaluation/plan.py", "measuring/harness.py",
    "models/extension.py", "models/infill.py",
    "control/structured/tools.py",
    "drafters/blend.py", "drafters/draft_model/base.py", "drafters/model.py", "drafters/recycle.py",
    "drafters/retrieved_context.py",
    "control/keywords.py",
    "deprecated.py", "lm.py", "serving/api/choices.py", "serving/api/parse.py", "serving/batch.py",
    "serving/operator_policy.py", "engines/formats.py", "request_options.py",
    "serving/api/ollama_schemas.py", "serving/api/schemas.py",
}  # fmt: skip


def test_no_refusal_of_a_combination_lives_elsewhere():
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and REFUSAL.search(ast.unparse(node)):
                found.add(str(file.relative_to(PACKAGE)))
    assert found - {"compatibility.py"} <= SETTINGS
