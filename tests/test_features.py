import json
from pathlib import Path

import pytest

from paceline.features import FEATURES, NOT_YET, SHARED, WHY_NOT, claims, coverage
from paceline.method_card import card, numbers, settings
from paceline.registry import FAMILIES
from tests.conftest import shared

ROOT = Path(__file__).resolve().parent.parent
METHODS = [
    pytest.param(method, id=f"{family}-{name}")
    for family, registry in FAMILIES.items()
    for name, method in registry.methods().items()
]


@pytest.fixture(scope="module")
def catalogue():
    lines = shared("methods", "catalogue.jsonl").read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def test_every_claim_is_of_a_system_of_the_catalogue(catalogue):
    assert {claim.number for claim in claims()} <= set(catalogue)


def test_what_is_claimed_twice_says_why():
    twice = {number for number, several in coverage().items() if len(several) > 1}
    assert twice == set(SHARED)


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_features_are_where_they_say(feature):
    assert (ROOT / feature.module).is_file()
    assert set(feature.missing) <= set(feature.catalogue)
    assert [each.name for each in FEATURES].count(feature.name) == 1


@pytest.mark.parametrize("method", METHODS)
def test_methods_describe_themselves(method):
    row = json.loads(json.dumps(card(method)))
    assert row["summary"]
    assert set(method.missing) <= set(method.catalogue)
    for setting in settings(method):
        assert setting.doc, f"{method.name}:{setting.name} is not documented"


def test_every_core_system_is_served_or_listed_as_not_yet(catalogue):
    core = {number for number, row in catalogue.items() if row["scope"] == "core"}
    assert set(NOT_YET) == core - set(coverage())
    assert set(WHY_NOT) <= set(NOT_YET)  # a reason goes with what it was in the way of
    page = (ROOT / "docs" / "reference" / "methods" / "coverage.md").read_text()
    for number, state in numbers().items():
        assert f"| {number} | {state} |" in page
