"""The bodies of Ollama's API, and their conversion to chat and completion bodies."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from paceline.compatibility import Side, check
from paceline.serving.api.schemas import (
    CalledFunction,
    ChatBody,
    CompletionBody,
    Message,
    Tool,
    ToolCallBody,
)
from paceline.serving.api.strict import ANY, NULL, Strict

# Names of options there -> of fields here, where they differ.
_RENAMED = {"repeat_penalty": "repetition_penalty", "mirostat": "mirostat_mode"}
_FORM = "json, or a JSON schema"


class OllamaOptions(Strict):
    """How the answer is written; the server's settings decide the rest."""

    temperature: float | None = Field(None, ge=0, le=100)
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    num_predict: int | None = Field(None, description="Maximum tokens; below 1: no maximum.")
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    mirostat: Literal[0, 2] | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None

    unused: ClassVar = {
        "num_ctx": ANY,
        "num_keep": ANY,
        "num_batch": ANY,
        "num_gpu": ANY,
        "main_gpu": ANY,
        "num_thread": ANY,
        "use_mmap": ANY,
        "use_mlock": ANY,
        "low_vram": ANY,
        "numa": ANY,
        "f16_kv": ANY,
        "vocab_only": (False,),
        "penalize_newline": (True,),
        "tfs_z": (1, 1.0),
    }

    def fields(self) -> dict[str, Any]:
        """Return the fields of a body here."""
        given = self.model_dump(exclude_none=True, exclude={"num_predict"})
        fields = {_RENAMED.get(name, name): value for name, value in given.items()}
        if self.num_predict is not None and self.num_predict > 0:
            fields["max_tokens"] = self.num_predict
        return fields


class OllamaBody(Strict):
    """What both routes that generate take."""

    model: str
    stream: bool = True
    format: Literal["json", ""] | dict[str, Any] | None = Field(None, description=_FORM)
    options: OllamaOptions | None = None
    think: bool | Literal["low", "medium", "high"] | None = Field(
        None, description="Sets `enable_thinking`, where the chat template has it."
    )

    unused: ClassVar = {
        "keep_alive": ANY,
        "images": ([],),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "truncate": ANY,
        "shift": ANY,
    }

    def template_settings(self) -> dict[str, Any] | None:
        """Return the variables of the chat template."""
        return None if self.think is None else {"enable_thinking": bool(self.think)}

    def shared(self) -> dict[str, Any]:
        """Return the fields that do not depend on the route."""
        fields = self.options.fields() if self.options else {}
        if self.format:
            form = {"type": "object"} if self.format == "json" else self.format
            fields["guided_json"] = form
        return fields


class OllamaFunction(Strict):
    """A function and its arguments."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)

    unused: ClassVar = {"index": ANY, "description": ANY}


class OllamaCall(Strict):
    """A call that the assistant made."""

    id: str | None = None
    function: OllamaFunction

    unused: ClassVar = {"type": ANY}


class OllamaMessage(Strict):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: list[Any] | None = None

    @field_validator("images")
    @classmethod
    def _no_images(cls, images: list[Any] | None) -> list[Any] | None:
        if images:
            raise ValueError("this model reads text only, no images; leave images out")
        return images


class OllamaTool(Tool):
    """A function that may be called."""

    unused: ClassVar = {"items": ANY}


class OllamaChatBody(OllamaBody):
    """`POST /api/chat`."""

    messages: list[OllamaMessage] = Field(default_factory=list)
    tools: list[OllamaTool] | None = None

    def as_chat(self) -> ChatBody:
        """Return the equivalent chat body."""
        messages = [_message(message, index) for index, message in enumerate(self.messages)]
        tools: list[Tool] = [*(self.tools or [])]
        settings = self.template_settings()
        return ChatBody(
            messages=messages,
            tools=tools or None,
            chat_template_kwargs=settings,
            **self.shared(),
        )


class OllamaGenerateBody(OllamaBody):
    """`POST /api/generate`."""

    prompt: str = ""
    system: str | None = None
    raw: bool = Field(False, description="The prompt is used as it is, without the template.")
    suffix: str = Field("", description="The text behind the answer; the template is not used.")

    unused: ClassVar = {
        **OllamaBody.unused,
        "template": ("",),
        "context": ([],),
    }

    def as_chat(self) -> ChatBody:
        """Return the equivalent chat body."""
        messages = [Message(role="user", content=self.prompt)]
        if self.system:
            messages.insert(0, Message(role="system", content=self.system))
        settings = self.template_settings()
        return ChatBody(messages=messages, chat_template_kwargs=settings, **self.shared())

    def as_completion(self) -> CompletionBody:
        """Return the equivalent completion body.

        Raises:
            CombinationError: there is a system prompt, which needs a template.
        """
        if self.system:
            side = "suffix" if self.suffix else "raw"
            check({Side.SYSTEM_PROMPT: "system", Side.RAW_PROMPT: side})
        return CompletionBody(prompt=self.prompt, suffix=self.suffix or None, **self.shared())


class OllamaShowBody(Strict):
    """`POST /api/show`."""

    model: str | None = None
    name: str | None = None

    unused: ClassVar = {"verbose": ANY, "system": NULL, "template": NULL, "options": NULL}


def _message(message: OllamaMessage, index: int) -> Message:
    calls = [_call(call, f"call_{index}_{at}") for at, call in enumerate(message.tool_calls or [])]
    return Message(
        role=message.role,
        content=message.content,
        name=message.tool_name,
        tool_calls=calls or None,
        tool_call_id=message.tool_call_id,
        reasoning_content=message.thinking,
    )


def _call(call: OllamaCall, name: str) -> ToolCallBody:
    arguments = json.dumps(call.function.arguments, ensure_ascii=False)
    function = CalledFunction(name=call.function.name, arguments=arguments)
    return ToolCallBody(id=call.id or name, function=function)
