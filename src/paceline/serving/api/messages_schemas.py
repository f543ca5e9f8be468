"""The body of `POST /v1/messages`, and its conversion to a chat body."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from paceline.errors import RequestError
from paceline.serving.api.schemas import (
    CalledFunction,
    ChatBody,
    DocumentBody,
    FunctionBody,
    FunctionName,
    Message,
    NamedToolChoice,
    ResponseFormat,
    SamplingBody,
    SchemaBody,
    Tool,
    ToolCallBody,
    only_text,
)
from paceline.serving.api.strict import ANY, NULL, Strict

_CACHED = {"cache_control": ANY}  # prefixes are cached without being asked


class TextBlock(Strict):
    """A text."""

    type: Literal["text"]
    text: str

    unused: ClassVar = {**_CACHED, "citations": ANY}


class ToolUseBlock(Strict):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]

    unused: ClassVar = {**_CACHED, "caller": ANY}


class ToolResultBlock(Strict):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None

    unused: ClassVar = {**_CACHED, "is_error": ANY}

    _text = field_validator("content", mode="before")(only_text)


class TextSource(Strict):
    """The text of a document."""

    type: Literal["text"]
    media_type: Literal["text/plain"] = "text/plain"
    data: str


class DocumentBlock(Strict):
    """A document of text; all of a conversation stand before its last user's message."""

    type: Literal["document"]
    source: TextSource
    title: str | None = None

    unused: ClassVar = {**_CACHED, "citations": ANY, "context": NULL}


class ThinkingBlock(Strict):
    """What an earlier answer thought."""

    type: Literal["thinking"]
    thinking: str

    unused: ClassVar = {"signature": ANY}


def _kind(block: Any) -> str:
    """Return the type of a block, by which it is read."""
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", "")
    return kind if isinstance(kind, str) else ""


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[DocumentBlock, Tag("document")]
    | Annotated[ThinkingBlock, Tag("thinking")],
    Discriminator(_kind),
]


def _form(content: Any) -> str:
    """Return whether a content is a text or blocks."""
    return "text" if isinstance(content, str) else "blocks"


def _text_or_documents(content: Any) -> Any:
    """Refuse the parts of a content that are neither text nor documents of text.

    Raises:
        ValueError: says what was found.
    """
    parts = content if isinstance(content, list) else []
    only_text([part for part in parts if not _is_document(part)])
    return content


def _is_document(part: Any) -> bool:
    """Return whether a part is a document whose source is text."""
    source = part.get("source") if isinstance(part, dict) else None
    return _kind(part) == "document" and isinstance(source, dict) and source.get("type") == "text"


class MessagesTurn(Strict):
    """A message of a conversation."""

    role: Literal["user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[Block], Tag("blocks")], Discriminator(_form)
    ]

    _text = field_validator("content", mode="before")(_text_or_documents)


class MessagesTool(Strict):
    """A function that may be called."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    unused: ClassVar = {
        **_CACHED,
        "eager_input_streaming": ANY,
        "input_examples": ANY,
        "defer_loading": (False,),
    }


class MessagesToolChoice(Strict):
    """Whether a tool must be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Strict):
    """Whether the model thinks first, where its chat template has `enable_thinking`."""

    type: Literal["enabled", "disabled", "adaptive"]

    unused: ClassVar = {"budget_tokens": ANY, "display": ANY}


class MessagesFormat(Strict):
    """The format of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """Options of the answer."""

    format: MessagesFormat | None = None

    unused: ClassVar = {"effort": ANY}


class MessagesBody(SamplingBody):
    """`POST /v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1)]
    messages: Annotated[list[MessagesTurn], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    stop_sequences: list[str] | None = None
    tools: list[MessagesTool] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    metadata: dict[str, Any] | None = Field(None, description="`user_id` names the client.")

    unused: ClassVar = {
        **SamplingBody.unused,
        **_CACHED,
        "betas": ANY,
        "container": NULL,
        "context_management": NULL,
        "inference_geo": ANY,
        "mcp_servers": ([],),
    }

    @property
    def client(self) -> str | None:
        """Return the user whose request it is."""
        user = (self.metadata or {}).get("user_id")
        return user if isinstance(user, str) else self.user

    def as_chat(self) -> ChatBody:
        """Return the equivalent chat body.

        Raises:
            RequestError: two fields contradict each other, or nothing is said.
        """
        if self.stop is not None and self.stop_sequences is not None:
            raise RequestError("stop and stop_sequences are both given; give one")
        messages = [message for turn in self.messages for message in _messages(turn)]
        if self.system is not None:
            messages.insert(0, Message(role="system", content=_joined(self.system)))
        if not messages:
            raise RequestError("messages say nothing; give at least one block")
        shared = {name: getattr(self, name) for name in SamplingBody.model_fields}
        shared["documents"] = [*(self.documents or []), *_documents(self.messages)] or None
        stop = self.stop if self.stop_sequences is None else self.stop_sequences
        choice = self.tool_choice
        return ChatBody(
            **shared | {"stop": stop, "metadata": None},
            messages=messages,
            max_completion_tokens=self.max_tokens,
            tools=[_tool(tool) for tool in self.tools or []] or None,
            tool_choice=_choice(choice) if choice else None,
            parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
            chat_template_kwargs=self._template_settings(),
            response_format=self._format(),
        )

    def _template_settings(self) -> dict[str, Any] | None:
        if self.thinking is None:
            return None
        return {"enable_thinking": self.thinking.type != "disabled"}

    def _format(self) -> ResponseFormat | None:
        form = self.output_config and self.output_config.format
        if not form:
            return None
        return ResponseFormat(type="json_schema", json_schema=SchemaBody(schema=form.schema_))


class CountBody(MessagesBody):
    """`POST /v1/messages/count_tokens`."""

    max_tokens: Annotated[int, Field(ge=1)] = 1


def _messages(turn: MessagesTurn) -> Iterator[Message]:
    """Yield the chat messages of a turn: results of tools first, as templates want them.

    Raises:
        RequestError: a block does not belong to the turn's role.
    """
    if isinstance(turn.content, str):
        yield Message(role=turn.role, content=turn.content)
        return
    texts, calls, thoughts = list[str](), list[ToolCallBody](), list[str]()
    for block in turn.content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, DocumentBlock):
            if turn.role != "user":
                raise RequestError("a message of the assistant holds a document; move it")
        elif (turn.role == "user") != isinstance(block, ToolResultBlock):
            raise RequestError(f"a message of the {turn.role} holds {block.type}; move it")
        elif isinstance(block, ToolResultBlock):
            content = _joined(block.content or "")
            yield Message(role="tool", tool_call_id=block.tool_use_id, content=content)
        elif isinstance(block, ToolUseBlock):
            arguments = json.dumps(block.input, ensure_ascii=False)
            function = CalledFunction(name=block.name, arguments=arguments)
            calls.append(ToolCallBody(id=block.id, function=function))
        else:
            thoughts.append(block.thinking)
    if texts or calls or thoughts:
        yield Message(
            role=turn.role,
            content="".join(texts) if texts else None,
            tool_calls=calls or None,
            reasoning_content="".join(thoughts) or None,
        )


def _documents(turns: list[MessagesTurn]) -> Iterator[DocumentBody]:
    """Yield the documents of all turns."""
    for turn in turns:
        for block in () if isinstance(turn.content, str) else turn.content:
            if isinstance(block, DocumentBlock):
                yield DocumentBody(text=block.source.data, title=block.title)


def _joined(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _tool(tool: MessagesTool) -> Tool:
    function = FunctionBody(
        name=tool.name,
        description=tool.description,
        parameters=tool.input_schema,
        strict=tool.strict,
    )
    return Tool(type="function", function=function)


def _choice(choice: MessagesToolChoice) -> Literal["none", "auto", "required"] | NamedToolChoice:
    if (choice.type == "tool") != (choice.name is not None):
        raise RequestError("tool_choice of type tool needs a name, and no other type takes one")
    if choice.name is not None:
        return NamedToolChoice(type="function", function=FunctionName(name=choice.name))
    if choice.type == "any":
        return "required"
    return "none" if choice.type == "none" else "auto"
