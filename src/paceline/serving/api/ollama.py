"""`/api/chat`, `/api/generate` and what else Ollama's clients ask for, in Ollama's formats."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from hashlib import sha256
from time import monotonic
from typing import Any

from fastapi import APIRouter, Request

from paceline import __version__
from paceline.errors import RequestError
from paceline.serving.api.collect import ChoiceCollector
from paceline.serving.api.dependencies import (
    Dependencies,
    Here,
    client_of,
    new_id,
    submit_jobs,
)
from paceline.serving.api.errors import error_body
from paceline.serving.api.formatting import Choice
from paceline.serving.api.ollama_schemas import (
    OllamaBody,
    OllamaChatBody,
    OllamaGenerateBody,
    OllamaShowBody,
)
from paceline.serving.api.parse import chat_jobs, completion_jobs
from paceline.serving.messages import Job

router = APIRouter(prefix="/api")
_Object = dict[str, Any]
_LATEST = ":latest"


@router.post("/chat", response_model=None)
async def chat(body: OllamaChatBody, request: Request, here: Here) -> Any:
    """Answer the last message of a conversation, as Ollama does."""
    _check_model(here, body.model)
    if not body.messages:  # asks for the model to be loaded
        return _head(here) | {"message": _message(""), "done": True, "done_reason": "load"}
    name, client = new_id("ollama"), client_of(request)
    jobs = await asyncio.to_thread(chat_jobs, here.lm, body.as_chat(), name, client, here.limits)
    return await _answer(body, request, here, jobs, _chat_piece)


@router.post("/generate", response_model=None)
async def generate(body: OllamaGenerateBody, request: Request, here: Here) -> Any:
    """Answer a prompt, as Ollama does."""
    _check_model(here, body.model)
    if not body.prompt and not body.suffix:
        return _head(here) | {"response": "", "done": True, "done_reason": "load"}
    name, client = new_id("ollama"), client_of(request)

    def jobs() -> list[Job]:
        if body.raw or body.suffix or here.lm.tokenizer.template is None:
            completion = body.as_completion()
            return completion_jobs(here.lm, completion, name, client, here.limits)[0]
        return chat_jobs(here.lm, body.as_chat(), name, client, here.limits)

    return await _answer(body, request, here, await asyncio.to_thread(jobs), _text_piece)


@router.get("/tags")
async def tags(here: Here) -> _Object:
    """List the model, as Ollama does."""
    return {"models": [_card(here)]}


@router.get("/ps")
async def running(here: Here) -> _Object:
    """List the model as loaded, as Ollama does."""
    card = _card(here) | {"expires_at": "9999-12-31T23:59:59Z", "size_vram": 0}
    return {"models": [card | {"context_length": here.lm.engine.config.context}]}


@router.post("/show")
async def show(body: OllamaShowBody, here: Here) -> _Object:
    """Describe the model, as Ollama does."""
    name = body.model or body.name
    if name is None:
        raise RequestError("model is missing; give the name of the model")
    _check_model(here, name)
    config, template = here.lm.engine.config, here.lm.tokenizer.template
    tools = ["tools"] if template and template.takes_tools else []
    return {
        "modelfile": f"FROM {here.name}",
        "parameters": "",
        "template": template.source if template else "",
        "details": _details(here),
        "model_info": {
            "general.architecture": config.family,
            f"{config.family}.context_length": config.context,
            f"{config.family}.embedding_length": config.hidden_size,
            f"{config.family}.block_count": len(config.layers),
            f"{config.family}.vocab_size": config.vocab_size,
        },
        "capabilities": ["completion", *tools],
        "modified_at": _now(),
    }


@router.get("/version")
async def version() -> dict[str, str]:
    """Return the version of this server."""
    return {"version": __version__}


Piece = Callable[[Choice, str, str], _Object]


async def _answer(
    body: OllamaBody, request: Request, here: Dependencies, jobs: list[Job], piece: Piece
) -> Any:
    begun = monotonic()
    collector = await submit_jobs(here, request, jobs)
    if body.stream:
        lines = _lines(here, collector, piece, begun)
        return collector.streamed(lines, _failed, "application/x-ndjson")
    await collector.finish(request, here.lm)
    [choice] = collector.choices
    texts = piece(choice, choice.content, choice.reasoning)
    return _head(here) | texts | _end(choice, begun)


async def _lines(
    here: Dependencies, collector: ChoiceCollector, piece: Piece, begun: float
) -> AsyncIterator[str]:
    [choice] = collector.choices
    sent = thought = 0
    async for _, event in collector.events():
        if event.finish == "error":
            yield _line({"error": event.error})
            return
        content, reasoning = choice.content[sent:], choice.reasoning[thought:]
        sent, thought = sent + len(content), thought + len(reasoning)
        texts = piece(choice, content, reasoning)
        if event.finish:
            yield _line(_head(here) | texts | _end(choice, begun))
        elif content or reasoning:
            yield _line(_head(here) | texts | {"done": False})


def _chat_piece(choice: Choice, content: str, reasoning: str) -> _Object:
    """Return new content, at the end with the tool calls."""
    message = _message(content, choice.calls if choice.finish else [])
    return {"message": message | ({"thinking": reasoning} if reasoning else {})}


def _text_piece(choice: Choice, content: str, reasoning: str) -> _Object:
    return {"response": content} | ({"thinking": reasoning} if reasoning else {})


def _message(content: str, calls: list[_Object] | None = None) -> _Object:
    message: _Object = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [_call(call, index) for index, call in enumerate(calls)]
    return message


def _call(call: _Object, index: int) -> _Object:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        arguments = function["arguments"]
    found = {"index": index, "name": function["name"], "arguments": arguments}
    return {"id": call["id"], "function": found}


def _end(choice: Choice, begun: float) -> _Object:
    """Return what the last piece has besides: why it ended, counts, and durations in ns."""
    now = monotonic()
    first = min(max(choice.begun or now, begun), now)
    return {
        "done": True,
        "done_reason": "stop" if choice.finish == "tool_calls" else choice.finish,
        "total_duration": _nanoseconds(now - begun),
        "load_duration": 0,
        "prompt_eval_count": len(choice.job.request.prompt),
        "prompt_eval_duration": _nanoseconds(first - begun),
        "eval_count": len(choice.tokens),
        "eval_duration": _nanoseconds(now - first),
    }


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _head(here: Dependencies) -> _Object:
    return {"model": here.name, "created_at": _now()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _check_model(here: Dependencies, name: str) -> None:
    """Refuse a request for another model; Ollama's clients append a tag to names."""
    here.check_model(here.name if name == here.name + _LATEST else name)


def _card(here: Dependencies) -> _Object:
    return {
        "name": here.name,
        "model": here.name,
        "modified_at": _now(),
        "size": here.lm.engine.weight_bytes or 0,
        "digest": sha256(here.name.encode(errors="replace")).hexdigest(),
        "details": _details(here),
    }


def _details(here: Dependencies) -> _Object:
    family = here.lm.engine.config.family
    return {
        "parent_model": "",
        "format": "gguf" if here.lm.model.gguf else "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": "",
    }


def _line(piece: _Object) -> str:
    return json.dumps(piece, ensure_ascii=False) + "\n"


def _failed(error: Exception) -> str:
    """Return the line that ends a stream which fails on its way."""
    return _line({"error": error_body(error)["error"]["message"]})
