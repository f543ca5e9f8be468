"""Chooses the replica for a request: if possible the one that has computed its prefix before.

Replicas are ranked by a hash of the prompt's beginning and the replica's name (rendezvous hashing,
Thaler and Ravishankar 1998), so that a replica that joins or leaves moves no other replica's
requests; one with more than its share of the load comes last (consistent hashing with bounded
loads, arXiv 1608.01350).
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from math import ceil
from typing import Any

_TEXT = 512  # characters of a prompt that are hashed
_TOKENS = 128  # tokens of a prompt that are hashed
_SHARE = 1.25  # maximum load of a replica, relative to the mean


def beginning(body: object) -> str:
    """Return the prefix by which requests meet on one replica; empty without one.

    For a conversation this is everything up to the first message of the user, which stays the same
    as the conversation grows.
    """
    if not isinstance(body, dict):
        return ""
    if isinstance(body.get("messages"), list):
        return _first_messages(body["messages"])[:_TEXT]
    prompt = body.get("prompt", body.get("input"))
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list):
        return " ".join(map(str, prompt[:_TOKENS]))[: 8 * _TEXT]
    return prompt[:_TEXT] if isinstance(prompt, str) else ""


def _first_messages(messages: list[Any]) -> str:
    parts = []
    for message in messages:
        if isinstance(message, dict):
            parts.append(f"{message.get('role')}: {message.get('content')!s}")
            if message.get("role") == "user":
                break
    return "\n".join(parts)


def ranked(key: str, loads: Mapping[str, int]) -> list[str]:
    """Return the replicas in the order in which to try them.

    Args:
        key: a request's beginning; with an empty one the least loaded replica comes first.
        loads: number of running requests of each replica.
    """
    max_load = ceil(_SHARE * (sum(loads.values()) + 1) / max(len(loads), 1))

    def rank(name: str) -> tuple[bool | int, bytes]:
        text = f"{key}\0{name}".encode(errors="surrogatepass")
        full = loads[name] >= max_load if key else loads[name]
        return full, blake2b(text, digest_size=8).digest()

    return sorted(loads, key=rank)
