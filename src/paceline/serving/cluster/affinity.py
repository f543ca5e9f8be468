"""Which replica a request goes to: the one that knows the beginning of its prompt, if it can.

Replicas are ranked by a hash of the beginning and their own name (rendezvous hashing, Thaler and
Ravishankar 1998), so that a replica that comes or goes moves no other's requests; one with more
than its share is passed over (consistent hashing with bounded loads, arXiv 1608.01350).
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from math import ceil
from typing import Any

_TEXT = 512  # characters of a prompt that count
_TOKENS = 128  # or tokens
_SHARE = 1.25  # of the mean load that one may bear


def beginning(body: object) -> str:
    """What requests have in common that should meet on one replica; empty where nothing is.

    Of a conversation it is all up to the first thing that the user says, which stays as it is when
    the conversation grows.
    """
    if not isinstance(body, dict):
        return ""
    if isinstance(body.get("messages"), list):
        return _said(body["messages"])[:_TEXT]
    prompt = body.get("prompt", body.get("input"))
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list):
        return " ".join(map(str, prompt[:_TOKENS]))[: 8 * _TEXT]
    return prompt[:_TEXT] if isinstance(prompt, str) else ""


def _said(messages: list[Any]) -> str:
    found = []
    for message in messages:
        if isinstance(message, dict):
            found.append(f"{message.get('role')}: {message.get('content')!s}")
            if message.get("role") == "user":
                break
    return "\n".join(found)


def ranked(key: str, loads: Mapping[str, int]) -> list[str]:
    """The replicas in the order in which to try them.

    Args:
        key: a request's beginning; one without goes to the least loaded.
        loads: requests under way at each.
    """
    most = ceil(_SHARE * (sum(loads.values()) + 1) / max(len(loads), 1))

    def rank(name: str) -> tuple[bool | int, bytes]:
        text = f"{key}\0{name}".encode(errors="surrogatepass")
        full = loads[name] >= most if key else loads[name]
        return full, blake2b(text, digest_size=8).digest()

    return sorted(loads, key=rank)
