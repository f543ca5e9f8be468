"""Python functions become tools: the schema says what the signature and the docstring say."""

import functools
import json
from enum import Enum
from typing import Any, Literal

import pytest

from paceline.control.structured.function_schema import function_tool, type_schema
from paceline.control.structured.tools import Tools
from paceline.errors import RequestError


class Unit(Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


def forecast(city: str, days: int = 1, *rest: Any, unit: Unit = Unit.CELSIUS, **more: Any) -> str:
    """Tell the weather of a city.

    It may rain: bring a coat.

    Args:
        city: where: a name,
            in two lines.
        unit (Unit): of the temperature.

    Returns:
        days: not a parameter.
    """


def test_signature_and_docstring_are_the_schema():
    found = function_tool(forecast)
    assert found["name"] == "forecast"
    assert found["description"] == "Tell the weather of a city.\n\nIt may rain: bring a coat."
    assert found["parameters"] == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "where: a name, in two lines."},
            "days": {"type": "integer"},
            "unit": {"enum": ["C", "F"], "description": "of the temperature."},
        },
        "required": ["city"],
        "additionalProperties": False,
    }
    assert Tools.of([found]).functions["forecast"] == found["parameters"]


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (float, {"type": "number"}),
        (bool, {"type": "boolean"}),
        (Any, {}),
        (list, {"type": "array", "items": {}}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
        (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
        (dict, {"type": "object", "additionalProperties": {}}),
        (str | None, {"anyOf": [{"type": "string"}, {"type": "null"}]}),
        (Literal["a", 3], {"enum": ["a", 3]}),
    ],
)
def test_types_have_schemas(hint, schema):
    assert type_schema(hint, "x") == schema
    json.dumps(schema)


@pytest.mark.parametrize("hint", [bytes, object(), dict[int, str], set[int], Literal[b"x"], 3])
def test_types_without_a_schema_are_refused(hint):
    with pytest.raises(RequestError, match="the thing has"):
        type_schema(hint, "the thing")


def test_methods_and_callables_leave_self_out():
    class Bound:
        def find(self, word: str) -> str: ...

        def __call__(self, word: str) -> str: ...

    assert list(function_tool(Bound().find)["parameters"]["properties"]) == ["word"]
    assert function_tool(Bound())["name"] == "Bound"
    assert list(function_tool(Bound())["parameters"]["properties"]) == ["word"]


def unknown_name(x: "Nowhere"): ...  # noqa: F821


@pytest.mark.parametrize(
    ("function", "said"),
    [(len, "positional-only"), (unknown_name, "annotations"), (int, "signature")],
)
def test_functions_that_cannot_be_tools_are_refused(function, said):
    with pytest.raises(RequestError, match=said):
        function_tool(function)


def test_a_partial_function_is_a_tool():
    found = function_tool(functools.partial(forecast, days=3))
    assert found["parameters"]["required"] == ["city"]
