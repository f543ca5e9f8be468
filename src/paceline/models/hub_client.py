"""The Hugging Face hub by its own client, an optional dependency."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from paceline.errors import ModelError
from paceline.models.known_models import HubFile

_PATIENCE = 4.0  # seconds; the client itself retries for half a minute


def client_missing() -> bool:
    """Return whether huggingface_hub is not installed."""
    try:
        return importlib.util.find_spec("huggingface_hub") is None
    except ValueError:  # a module without a spec
        return True


def offline() -> bool:
    """Return whether HF_HUB_OFFLINE is set."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def hub_reachable() -> bool:
    """Return whether the hub answers at all; HF_ENDPOINT names another one."""
    if offline():
        return False
    import urllib.error  # slow to import, and rarely used
    import urllib.request

    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(
            urllib.request.Request(address, method="HEAD"), timeout=_PATIENCE
        ).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False
    return True


def download_file(where: HubFile, folder: Path) -> Path:
    """Download one file of a repository into a folder; an interrupted download goes on.

    Raises:
        ModelError: the client's reason.
    """
    from huggingface_hub import hf_hub_download

    utils: Any = importlib.import_module("huggingface_hub.utils")
    silent = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()  # ours shows it
    address = f"{where.repository}/{where.file}"
    try:
        return Path(
            hf_hub_download(where.repository, where.file, revision=where.revision, local_dir=folder)
        )
    except Exception as error:  # the client passes on whatever its transport raises
        raise ModelError(f"the hub gives no {address}: {reason(error)}") from None
    finally:
        if not silent:
            utils.enable_progress_bars()


def reason(error: Exception) -> str:
    """Return the first line of an error, or its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
