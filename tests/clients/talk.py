"""What every client is made to say."""

from typing import Literal

import pydantic

QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]
TALE = "Write a story about a fox."
TALE_MESSAGES = [{"role": "user", "content": TALE}]
WEATHER = "What is the weather in Paris?"
REPORT = "18 degrees and rain"
# A small model calls a tool by itself where it only has to repeat the call.
CALL = 'Say exactly this: {"name": "get_weather", "arguments": {"city": "Paris"}}'
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
