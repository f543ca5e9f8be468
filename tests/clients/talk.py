"""What every client is made to say."""

from typing import Literal

import pydantic

QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]
WEATHER = "What is the weather in Paris?"
REPORT = "18 degrees and rain"
TOO_LONG = "word " * 9000  # SmolLM2 sees 8192 tokens


class City(pydantic.BaseModel):
    """A city, of which a small model can say little that is wrong."""

    name: Literal["Paris"]
    size: Literal["small", "big"]


GET_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def get_weather(city: Literal["Paris"]) -> str:
    """Get the weather of a city."""
    assert city == "Paris"
    return REPORT
