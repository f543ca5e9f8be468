"""Lists models: those of the catalogue, the embedded one, and those in the hub's cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paceline.models.hub import EMBEDDED
from paceline.models.hub_client import client_missing
from paceline.models.known_models import APACHE, KNOWN_MODELS, KnownModel

_RUNNABLE = (".safetensors", ".gguf")


@dataclass(frozen=True)
class ListedModel:
    """One row of `paceline models`.

    Attributes:
        name: what `--model` takes; `embedded` is the model of no `--model`.
        title: what its makers call it; empty if unknown.
        size: bytes on the disk or to be.
        licence: its name; empty if unknown.
        terms: where the licence can be read; empty if unknown.
        chat: whether it is tuned for conversation; None if unknown.
        sources: where it comes from: `hub`, `pypi`, `package`.
        here: whether it can run without a network.
        path: of its file or folder; None while it is not here.
    """

    name: str
    title: str
    size: int
    licence: str
    terms: str
    chat: bool | None
    sources: tuple[str, ...]
    here: bool
    path: str | None


def list_models() -> list[ListedModel]:
    """Return the catalogue, then what else is here."""
    return [*map(_known, KNOWN_MODELS.values()), *_embedded(), *_in_hub_cache()]


def _known(model: KnownModel) -> ListedModel:
    sources = (["hub"] if model.hub else []) + (["pypi"] if model.wheels else [])
    return ListedModel(
        model.name,
        model.title,
        model.size,
        model.licence,
        model.terms,
        model.chat,
        tuple(sources),
        model.here,
        str(model.path) if model.here else None,
    )


def _embedded() -> Iterator[ListedModel]:
    if (EMBEDDED / "config.json").is_file():
        size = sum(path.stat().st_size for path in EMBEDDED.iterdir() if path.is_file())
        title, terms = "Paceline's story model", APACHE
        yield ListedModel(
            "embedded", title, size, "Apache-2.0", terms, False, ("package",), True, str(EMBEDDED)
        )


def _in_hub_cache() -> Iterator[ListedModel]:
    """Yield what `owner/name` finds without a network."""
    if client_missing():
        return
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda each: str(each.repo_id)):
        if repository.repo_type != "model":
            continue
        for revision in repository.revisions:
            names = {Path(file.file_name).suffix for file in revision.files}
            if names.intersection(_RUNNABLE):
                size, path = revision.size_on_disk, str(revision.snapshot_path)
                yield ListedModel(
                    str(repository.repo_id), "", size, "", "", None, ("hub",), True, path
                )
                break
