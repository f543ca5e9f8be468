"""Request bodies. Unknown fields are refused: nothing is silently ignored."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from paceline.documents.prompt import MAX_DOCUMENTS
from paceline.serving.api.strict import ANY, NULL, Strict

Texts = str | list[str]
Setting = bool | int | float | str | list[str | int] | dict[str, float]
Count = Annotated[int, Field(ge=1, le=128)]


class Speculation(Strict):
    """How this request is sped up; its text does not depend on it."""

    drafter: str | None = Field(None, description="One of the server's drafters, or `plain`.")
    budget: Annotated[int, Field(ge=0, le=256)] | Literal["auto"] | None = None


class StreamOptions(Strict):
    """What a stream contains besides the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="Usage so far with every piece.")

    unused: ClassVar = {"include_obfuscation": ANY}


class GuidanceBody(Strict):
    """Classifier-free guidance: away from another prompt, with the same model."""

    negative: str = Field("", description="The other prompt. Default: the prompt's last token.")
    scale: Annotated[float, Field(ge=0, le=100)] = 1.5
    stop: Annotated[float, Field(ge=0, le=1)] = 0.0


class StructuredOutputs(Strict):
    """The form of the output, as vLLM takes it; one of them."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    unused: ClassVar = {
        "disable_fallback": ANY,
        "disable_any_whitespace": ANY,
        "disable_additional_properties": ANY,
        "whitespace_pattern": NULL,
        "structural_tag": NULL,
    }


class DocumentBody(Strict):
    """A document that stands before the prompt."""

    text: str
    title: str | None = None


def form_of(value: Any) -> str:
    """Return whether a value is a text or something with parts."""
    return "text" if isinstance(value, str) else "parts"


OneDocument = Annotated[
    Annotated[str, Tag("text")] | Annotated[DocumentBody, Tag("parts")], Discriminator(form_of)
]


class SamplingBody(Strict):
    """Fields of all endpoints that generate, named as by OpenAI and other servers."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    top_a: float | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: Annotated[list[str], Field(max_length=1024)] | None = None
    min_tokens: int | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_sequence_breakers: Annotated[list[str], Field(max_length=1024)] | None = None
    mirostat_mode: Literal[0, 2] | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    sampler: str | dict[str, Setting] | None = Field(
        None, description="Any control, as in `--sampler` or by NAME and NAME.SETTING."
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Texts | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=1024)] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = Field(True, description="Or they are part of the text.")
    split_special_tokens: bool = Field(
        False,
        description="Special tokens in the prompt, or in the messages of users, tools and systems, "
        "are text: nobody ends a turn by writing the token that ends it.",
    )
    ignore_eos: bool = False
    stream: bool | None = None
    user: str | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = Field(
        None, description="Seconds; the unfinished answer then ends with the reason `timeout`."
    )
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    regex: str | None = Field(None, description="As SGLang names `guided_regex`.")
    json_schema: dict[str, Any] | str | None = Field(
        None, description="As llama.cpp and SGLang name `guided_json`."
    )
    guide: Texts | None = Field(None, description="Names of the server's guides.")
    guidance: GuidanceBody | None = None
    watermark: str | Literal[False] | None = Field(
        None, description="As in `--watermark`, or `false`, if the server allows it."
    )
    kv_policy: str | Literal[False] | None = Field(
        None, description="As in `--kv-policy`, or `false`, if the server allows it."
    )
    documents: Annotated[list[OneDocument], Field(max_length=MAX_DOCUMENTS)] | None = Field(
        None,
        description="Texts before the prompt, or before the last user's message; each is computed "
        "once, apart from the others, and reused.",
    )
    recompute: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Share of each document that is computed again behind the others."
    )
    speculation: Speculation | None = None
    metadata: dict[str, str] | None = None

    unused: ClassVar = {
        "service_tier": ANY,
        "safety_identifier": ANY,
        "prompt_cache_key": ANY,
        "prompt_cache_retention": ANY,
        "keep_alive": ANY,
        "spaces_between_special_tokens": ANY,
        "truncate_prompt_tokens": NULL,
        "request_id": ANY,
    }


class MultiChoiceBody(SamplingBody):
    """Fields of endpoints that return several choices."""

    n: Count | None = None
    best_of: Count | None = None
    use_beam_search: bool | None = None
    length_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    strategy: str | None = Field(None, description="Search strategy, as in `--strategy`.")
    store: Literal[False] | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool = Field(False, description="Return the ids of prompt and answer.")
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="Return each prompt token's log-probability, and so many likely ones."
    )
    trace: bool = Field(False, description="Return the drafter of each token, and the trees.")


class CompletionBody(MultiChoiceBody):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="0 reads the prompt only, as for its log-probabilities with `echo`."
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    add_special_tokens: bool = Field(True, description="Those that begin or end every text.")
    suffix: str | None = Field(
        None, description="The text behind the answer, for models that fill in the middle."
    )
    prediction: Prediction | None = None


class TextPart(Strict):
    """A part of a message's text."""

    type: Literal["text", "input_text", "output_text"]
    text: str

    @field_validator("text", mode="before")
    @classmethod
    def _empty(cls, value: object) -> object:
        return "" if value is None else value


class Prediction(Strict):
    """The expected output; it makes generation faster, not different."""

    type: Literal["content"] = "content"
    content: str | list[TextPart]


class CalledFunction(Strict):
    """A function and its arguments as JSON text."""

    name: str
    arguments: str = Field("", description="Empty and null are no arguments.")

    @field_validator("arguments", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        """Write arguments that come as an object, as some clients send them, as JSON."""
        return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


class ToolCallBody(Strict):
    """A call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    unused: ClassVar = {"index": ANY, "provider_specific_fields": ANY}


_NO_TEXT = {
    "image_url": "images",
    "input_image": "images",
    "image": "images",
    "input_audio": "audio",
    "video_url": "videos",
    "file": "files",
    "input_file": "files",
    "document": "documents",
}


def only_text(content: Any) -> Any:
    """Refuse the parts of a content that are no text, as what they are; a refusal is text.

    Raises:
        ValueError: says what was found.
    """
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in _NO_TEXT:
            raise ValueError(f"this model reads text only, no {_NO_TEXT[kind]}; leave {kind} out")
    return [_as_text(part) for part in content] if isinstance(content, list) else content


def _as_text(part: Any) -> Any:
    """Return the refusal of an earlier answer as a part of its text."""
    if isinstance(part, dict) and part.get("type") == "refusal":
        rest = {name: value for name, value in part.items() if name != "refusal"}
        return {**rest, "type": "text", "text": part.get("refusal")}
    return part


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    # What answers of OpenAI's API and of this server contain besides, and what LiteLLM adds.
    unused: ClassVar = {
        "refusal": ANY,
        "annotations": ANY,
        "audio": NULL,
        "function_call": NULL,
        "id": ANY,
        "status": ANY,
        "reasoning": ANY,
        "reasoning_details": ANY,
        "thinking_blocks": ANY,
        "provider_specific_fields": ANY,
    }

    _text = field_validator("content", mode="before")(only_text)


class FunctionBody(Strict):
    """A function that may be called."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool; only functions exist."""

    type: Literal["function"]
    function: FunctionBody


class FunctionName(Strict):
    """A function's name."""

    name: str


class AllowedTools(Strict):
    """The tools that may be called, and whether one must be."""

    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[list[NamedToolChoice], Field(min_length=1)]


class AllowedToolsChoice(Strict):
    """Only some of the tools may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class NamedToolChoice(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class SchemaBody(Strict):
    """A JSON schema that the answer follows."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """The format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaBody | None = None
    schema_: dict[str, Any] | None = Field(
        default=None, alias="schema", description="Of a json_object, as llama.cpp takes it."
    )


class ChatBody(MultiChoiceBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[NamedToolChoice | AllowedToolsChoice, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    prediction: Prediction | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the chat template, as enable_thinking."
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(
        None, description="The answer continues the last message; no new one begins."
    )
    include_reasoning: bool = Field(
        True, description="`<think>...</think>` at the beginning goes to `reasoning_content`."
    )

    unused: ClassVar = {
        **MultiChoiceBody.unused,
        "add_special_tokens": (True, False),  # of a conversation the template writes them
        "reasoning_effort": ANY,
        "verbosity": ANY,
        "modalities": (["text"],),
        "audio": NULL,
        "functions": NULL,
        "function_call": NULL,
        "web_search_options": NULL,
    }


class TokenizeBody(Strict):
    """`POST /tokenize`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    split_special_tokens: bool = False


class DetokenizeBody(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]


AllowedTools.model_rebuild()
CompletionBody.model_rebuild()
