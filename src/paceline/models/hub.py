"""Finds a checkpoint: a local folder, the hub's cache, or inside this package."""

from __future__ import annotations

import os
import re
from pathlib import Path

from paceline.errors import ModelError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_FILES = ["*.json", "*.jinja", "model*.safetensors"]

EMBEDDED = Path(__file__).parent.parent / "embedded"


def locate(source: str | Path | None) -> Path:
    """Return the folder of a checkpoint.

    Args:
        source: a folder, which takes precedence; a hub id `owner/name`, optionally with
            `@revision`; or None for the model inside this package. HF_HUB_OFFLINE=1 uses only
            what was downloaded before.

    Raises:
        ModelError: there is no such folder, and it is no hub id or cannot be fetched.
    """
    if source is None:
        return _embedded()
    if source == "":
        raise ModelError("the model is '', expected a folder with config.json, or a hub id")
    try:
        folder = Path(source).expanduser()
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except (OSError, RuntimeError) as error:  # a name that no file can have; an unknown ~user
        raise ModelError(f"{str(source)!r:.80} cannot be opened: {error!s:.80}") from None
    if is_folder:
        return folder
    if is_file:
        raise ModelError(f"{source} is a file, expected the folder that holds config.json")
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        return _fetch(source)
    raise ModelError(f"{source} does not exist; expected a folder with config.json, or a hub id")


def _embedded() -> Path:
    if not (EMBEDDED / "config.json").is_file():
        raise ModelError("this installation has no embedded model; name one with --model")
    return EMBEDDED


def _fetch(source: str) -> Path:
    name, _, revision = source.partition("@")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(
            f"{source} is no folder here, and fetching it from the hub needs huggingface_hub: "
            "pip install 'paceline[hub]'"
        ) from None
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=_FILES)
    except Exception as error:  # the client passes on whatever its transport raises
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        how = "not in the cache, and HF_HUB_OFFLINE is set" if offline else reason
        raise ModelError(f"{source} is no folder here and cannot be fetched: {how}") from None
    return Path(folder)
