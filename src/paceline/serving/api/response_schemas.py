"""The body of `POST /v1/responses`, and its conversion to a chat body."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from paceline.errors import RequestError
from paceline.serving.api.schemas import (
    AllowedTools,
    AllowedToolsChoice,
    CalledFunction,
    ChatBody,
    FunctionBody,
    FunctionName,
    Message,
    NamedToolChoice,
    ResponseFormat,
    SamplingBody,
    SchemaBody,
    TextPart,
    Tool,
    ToolCallBody,
    only_text,
)
from paceline.serving.api.strict import ANY, NULL, Strict, note_ignored

_LOGPROBS = "message.output_text.logprobs"

# Fields of items of an earlier response.
_EARLIER = {"id": ANY, "status": ANY, "phase": ANY, "created_by": ANY, "namespace": NULL}


class ResponseTextPart(TextPart):
    """A part of a text; parts of earlier responses come with empty lists."""

    unused: ClassVar = {"annotations": ANY, "logprobs": ANY}


class ResponseMessage(Strict):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ResponseTextPart] | None

    unused: ClassVar = _EARLIER

    _text = field_validator("content", mode="before")(only_text)


class FunctionCall(CalledFunction):
    """A call that an earlier response made."""

    type: Literal["function_call"]
    call_id: str

    unused: ClassVar = _EARLIER


class FunctionOutput(Strict):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ResponseTextPart] | None

    unused: ClassVar = _EARLIER

    _text = field_validator("output", mode="before")(only_text)


class Reasoning(Strict):
    """What an earlier response thought, which is not part of the conversation here."""

    type: Literal["reasoning"]

    unused: ClassVar = {
        **_EARLIER,
        "summary": ANY,
        "content": ANY,
        "encrypted_content": ANY,
    }


def _kind(item: Any) -> str:
    """Return the kind of an item, by which it is read."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "")
    return kind if isinstance(kind, str) else ""


InputItem = Annotated[
    Annotated[ResponseMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionOutput, Tag("function_call_output")]
    | Annotated[Reasoning, Tag("reasoning")],
    Discriminator(_kind),
]


class ResponseTool(FunctionBody):
    """A function that may be called."""

    type: Literal["function"]


class ResponseToolChoice(FunctionName):
    """The function that must be called."""

    type: Literal["function"]


class ResponseAllowedTools(Strict):
    """Only some of the tools may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[list[ResponseToolChoice], Field(min_length=1)]


class ResponseTextFormat(Strict):
    """The format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseTextOptions(Strict):
    """Options of the text."""

    format: ResponseTextFormat | None = None

    unused: ClassVar = {"verbosity": ANY}


class ResponseBody(SamplingBody):
    """`POST /v1/responses`; nothing is stored, so each request brings its whole conversation."""

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: ResponseTextOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[ResponseToolChoice | ResponseAllowedTools, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    include: list[str] | None = Field(
        None, description=f"Only {_LOGPROBS} exists here; others change nothing."
    )
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    unused: ClassVar = {
        **SamplingBody.unused,
        "add_special_tokens": (True, False),
        "truncation": ANY,  # what is too long is refused
        "reasoning": ANY,
        "reasoning_effort": ANY,
        "stream_options": ANY,
        "max_tool_calls": ANY,
        "prompt": NULL,
        "conversation": NULL,
    }

    @field_validator("store", "previous_response_id", "background")
    @classmethod
    def _nothing_is_stored(cls, value: object) -> object:
        if value:
            raise ValueError("this server stores no responses; send the whole conversation")
        return value

    @field_validator("include")
    @classmethod
    def _only_logprobs_exist(cls, value: list[str] | None) -> list[str] | None:
        if value and set(value) != {_LOGPROBS}:
            note_ignored("include")
        return value

    @property
    def logprobs(self) -> bool:
        """Whether the text has log-probabilities."""
        return bool(self.top_logprobs) or _LOGPROBS in (self.include or ())

    def as_chat(self) -> ChatBody:
        """Return the equivalent chat body.

        Raises:
            RequestError: there is no message.
        """
        messages = [_message(item) for item in self._items() if not isinstance(item, Reasoning)]
        if self.instructions is not None:
            messages.insert(0, Message(role="system", content=self.instructions))
        if not messages:
            raise RequestError("input holds no message; give at least one")
        choice = self.tool_choice
        form = self.text.format if self.text else None
        shared = {name: getattr(self, name) for name in SamplingBody.model_fields}
        tools = [Tool(type="function", function=_function(tool)) for tool in self.tools or []]
        return ChatBody(
            **shared,
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            response_format=_format(form) if form else None,
            tools=tools or None,
            tool_choice=choice if choice is None or isinstance(choice, str) else _choice(choice),
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs if self.logprobs else None,
            parallel_tool_calls=self.parallel_tool_calls,
            include_reasoning=False,
        )

    def _items(self) -> list[ResponseMessage | FunctionCall | FunctionOutput | Reasoning]:
        if isinstance(self.input, str):
            return [ResponseMessage(role="user", content=self.input)]
        return self.input


def _message(item: ResponseMessage | FunctionCall | FunctionOutput) -> Message:
    if isinstance(item, FunctionOutput):
        return Message(role="tool", tool_call_id=item.call_id, content=_joined(item.output))
    if isinstance(item, FunctionCall):
        function = CalledFunction(name=item.name, arguments=item.arguments)
        return Message(
            role="assistant", tool_calls=[ToolCallBody(id=item.call_id, function=function)]
        )
    return Message(role=item.role, content=_joined(item.content))


def _joined(content: str | list[ResponseTextPart] | None) -> str:
    if isinstance(content, str):
        return content
    return "".join(piece.text for piece in content or ())


def _function(tool: ResponseTool) -> FunctionBody:
    return FunctionBody(**tool.model_dump(exclude={"type"}))


def _choice(
    choice: ResponseToolChoice | ResponseAllowedTools,
) -> NamedToolChoice | AllowedToolsChoice:
    if isinstance(choice, ResponseToolChoice):
        return NamedToolChoice(type="function", function=FunctionName(name=choice.name))
    named = [
        NamedToolChoice(type="function", function=FunctionName(name=tool.name))
        for tool in choice.tools
    ]
    return AllowedToolsChoice(
        type="allowed_tools", allowed_tools=AllowedTools(mode=choice.mode, tools=named)
    )


def _format(form: ResponseTextFormat) -> ResponseFormat:
    schema = None
    if form.schema_ is not None:
        schema = SchemaBody(name=form.name or "", schema=form.schema_, strict=form.strict)
    return ResponseFormat(type=form.type, json_schema=schema)
