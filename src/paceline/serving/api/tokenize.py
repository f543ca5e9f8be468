"""`/tokenize`, `/detokenize` and `/v1/models`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from paceline.errors import RequestError
from paceline.serving.api.dependencies import Dependencies, Here
from paceline.serving.api.parse import message_of
from paceline.serving.api.schemas import DetokenizeBody, TokenizeBody

router = APIRouter()


@router.get("/v1/models")
async def models(here: Here) -> dict[str, Any]:
    """List the model."""
    return {"object": "list", "data": [_model(here)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, here: Here) -> dict[str, Any]:
    """Return the model, if it is this one."""
    here.check_model(name)
    return _model(here)


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, here: Here) -> dict[str, Any]:
    """Return the tokens of a text or a conversation."""
    here.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give one of prompt and messages")
    if body.prompt is not None:
        tokens = here.lm.tokenizer.encode(
            body.prompt, body.add_special_tokens, body.split_special_tokens
        )
    else:
        messages = [message_of(message) for message in body.messages or []]
        tokens = here.lm.tokenizer.encode_chat(messages, split_special=body.split_special_tokens)
    window = here.lm.engine.config.context
    return {"tokens": tokens, "count": len(tokens), "max_model_len": window}


@router.get("/tokenizer_info")
async def tokenizer_info(here: Here) -> dict[str, Any]:
    """Return the special tokens and the chat template, as vLLM does."""
    tokenizer = here.lm.tokenizer
    template = tokenizer.template
    return {
        "bos_token": None,
        "eos_token": None,
        "pad_token": None,
        "unk_token": None,
        **tokenizer.special,
        "chat_template": None if template is None else template.source,
        "model_max_length": here.lm.engine.config.context,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, here: Here) -> dict[str, Any]:
    """Return the text of tokens."""
    here.check_model(body.model)
    size = here.lm.engine.config.vocab_size
    wrong = next((token for token in body.tokens if not 0 <= token < size), None)
    if wrong is not None:
        raise RequestError(f"token {wrong} is outside the vocabulary, expected 0 to {size - 1}")
    return {"prompt": here.lm.tokenizer.decode(body.tokens)}


def _model(here: Dependencies) -> dict[str, Any]:
    return {
        "id": here.name,
        "object": "model",
        "created": 0,
        "owned_by": "paceline",
        "max_model_len": here.lm.engine.config.context,
    }
