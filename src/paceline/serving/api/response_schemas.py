"""The body of `POST /v1/responses`, and its conversion to a chat body."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from paceline.serving.api.schemas import (
    CalledFunction,
    ChatBody,
    FunctionBody,
    FunctionName,
    Message,
    NamedToolChoice,
    ResponseFormat,
    SamplingBody,
    SchemaBody,
    Strict,
    TextPart,
    Tool,
    ToolCallBody,
)


class ResponseTextPart(TextPart):
    """A part of a text; parts of earlier responses come with empty lists."""

    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


class ResponseMessage(Strict):
    """A message; `id` and `status` are those of an earlier response."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ResponseTextPart]
    id: str | None = None
    status: str | None = None


class FunctionCall(CalledFunction):
    """A call that an earlier response made."""

    type: Literal["function_call"]
    call_id: str
    id: str | None = None
    status: str | None = None


class FunctionOutput(Strict):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str
    id: str | None = None
    status: str | None = None


class ResponseTool(FunctionBody):
    """A function that may be called."""

    type: Literal["function"]


class ResponseToolChoice(FunctionName):
    """The function that must be called."""

    type: Literal["function"]


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


class ResponseBody(SamplingBody):
    """`POST /v1/responses`; nothing is stored, so each request brings its whole conversation."""

    input: (
        str | Annotated[list[ResponseMessage | FunctionCall | FunctionOutput], Field(min_length=1)]
    )
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: ResponseTextOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    truncation: Literal["disabled"] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    background: bool | None = None

    @field_validator("store", "previous_response_id", "background")
    @classmethod
    def _nothing_is_stored(cls, value: object) -> object:
        if value:
            raise ValueError("this server stores no responses; send the whole conversation")
        return value

    def as_chat(self) -> ChatBody:
        """Return the equivalent chat body."""
        messages = [_message(item) for item in self._items()]
        if self.instructions is not None:
            messages.insert(0, Message(role="system", content=self.instructions))
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
            tool_choice=_choice(choice) if isinstance(choice, ResponseToolChoice) else choice,
        )

    def _items(self) -> list[ResponseMessage | FunctionCall | FunctionOutput]:
        if isinstance(self.input, str):
            return [ResponseMessage(role="user", content=self.input)]
        return self.input


def _message(item: ResponseMessage | FunctionCall | FunctionOutput) -> Message:
    if isinstance(item, FunctionOutput):
        return Message(role="tool", tool_call_id=item.call_id, content=item.output)
    if isinstance(item, FunctionCall):
        function = CalledFunction(name=item.name, arguments=item.arguments)
        return Message(
            role="assistant", tool_calls=[ToolCallBody(id=item.call_id, function=function)]
        )
    content = item.content
    if isinstance(content, list):
        content = "".join(piece.text for piece in content)
    return Message(role=item.role, content=content)


def _function(tool: ResponseTool) -> FunctionBody:
    return FunctionBody(**tool.model_dump(exclude={"type"}))


def _choice(choice: ResponseToolChoice) -> NamedToolChoice:
    return NamedToolChoice(type="function", function=FunctionName(name=choice.name))


def _format(form: ResponseTextFormat) -> ResponseFormat:
    schema = None
    if form.schema_ is not None:
        schema = SchemaBody(name=form.name or "", schema=form.schema_, strict=form.strict)
    return ResponseFormat(type=form.type, json_schema=schema)
