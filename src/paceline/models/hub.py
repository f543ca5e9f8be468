"""Finds a checkpoint: on this disk, by a name of the catalogue, or by its address on the hub."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from paceline.errors import ModelError
from paceline.models import hub_client
from paceline.models.download_bar import note
from paceline.models.formats.gguf import is_gguf, part_number
from paceline.models.known_models import KNOWN_MODELS, HubFile, KnownModel

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_HUB_FILE = re.compile(r"(\w[\w.-]*/\w[\w.-]*)/([\w./-]+\.gguf)(?:@([\w./-]+))?")
_FILES = ["*.json", "*.jinja", "model*.safetensors"]

_EXPECTED = (
    "a folder with config.json, a GGUF file, a hub id or a name that `paceline models` lists"
)

EMBEDDED = Path(__file__).parent.parent / "embedded"


def locate(source: str | Path | None) -> Path:
    """Return the folder or the GGUF file of a checkpoint.

    Args:
        source: a folder, which takes precedence; a GGUF file, or the first part of a split one; a
            name of the catalogue, pulled on first use; a hub id `owner/name` or a file
            `owner/name/file.gguf`, optionally with `@revision`; or None for the model inside this
            package. A folder without config.json that holds a single GGUF file stands for that
            file. HF_HUB_OFFLINE=1 uses only what was downloaded before.

    Raises:
        ModelError: nothing of that name is here, and it cannot be fetched.
    """
    if source is None:
        return _embedded()
    if source == "":
        raise ModelError(f"the model is '', expected {_EXPECTED}")
    try:
        folder = Path(source).expanduser()
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except (OSError, RuntimeError) as error:  # a name that no file can have; an unknown ~user
        raise ModelError(f"{str(source)!r:.80} cannot be opened: {error!s:.80}") from None
    if is_folder:
        return _single_gguf(folder) or folder
    if is_file:
        if folder.suffix == ".gguf" or is_gguf(folder):
            return folder
        raise ModelError(f"{source} is no GGUF file, expected one or a folder with config.json")
    if isinstance(source, str) and source in KNOWN_MODELS:
        return known_file(KNOWN_MODELS[source])
    if isinstance(source, str) and (match := _HUB_FILE.fullmatch(source)):
        repository, file, revision = match.groups()
        return _fetch_file(source, HubFile(repository, file, revision or "main"))
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        return _fetch(source)
    near = difflib.get_close_matches(str(source), KNOWN_MODELS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ModelError(f"{source} does not exist; expected {_EXPECTED}{hint}")


def known_file(model: KnownModel) -> Path:
    """Return the file of a model of the catalogue, after pulling it on first use.

    Raises:
        ModelError: it is not here and cannot be fetched, or HF_HUB_OFFLINE is set.
    """
    if model.here:
        return model.path
    if hub_client.offline():
        raise ModelError(
            f"{model.name} is not here, and HF_HUB_OFFLINE is set; run "
            f"`paceline pull {model.name}` where there is a network"
        )
    from paceline.models.pull import pull

    note(f"{model.name} is not here yet and is fetched once")
    try:
        return pull(model).path
    except ModelError as error:
        again = f"run `paceline pull {model.name}` when there is a network"
        raise ModelError(f"{error}; {again}") from None


def display_name(path: Path) -> str:
    """Return the name of a checkpoint: its folder's, or its GGUF file's without the suffix."""
    return path.stem if path.suffix == ".gguf" else path.name


def _single_gguf(folder: Path) -> Path | None:
    """Return the only GGUF model of a folder without config.json; None if it holds no such file.

    Later parts of split files and projectors of images (`mmproj`) are no models.
    """
    try:
        if (folder / "config.json").exists():
            return None
        files = sorted(
            path
            for path in folder.glob("*.gguf")
            if part_number(path) <= 1 and not path.name.startswith("mmproj")
        )
    except OSError as error:
        raise ModelError(f"cannot read {folder}: {error.strerror or error}") from None
    if len(files) > 1:
        shown = ", ".join(path.name for path in files[:3])
        raise ModelError(f"{folder} holds {len(files)} GGUF files ({shown} ...); name one of them")
    return files[0] if files else None


def _embedded() -> Path:
    if not (EMBEDDED / "config.json").is_file():
        raise ModelError("this installation has no embedded model; name one with --model")
    return EMBEDDED


def _fetch(source: str) -> Path:
    name, _, revision = source.partition("@")
    _check_client(source)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=_FILES)
    except Exception as error:  # the client passes on whatever its transport raises
        raise _unfetched(source, error) from None
    return Path(folder)


def _fetch_file(source: str, where: HubFile) -> Path:
    """Return a file of a repository in the hub's own cache, after fetching it if needed."""
    _check_client(source)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(where.repository, where.file, revision=where.revision))
    except Exception as error:  # the client passes on whatever its transport raises
        raise _unfetched(source, error) from None


def _check_client(source: str) -> None:
    if hub_client.client_missing():
        raise ModelError(
            f"{source} is not here, and fetching it from the hub needs huggingface_hub: "
            "pip install 'paceline[hub]'"
        )


def _unfetched(source: str, error: Exception) -> ModelError:
    offline = "not in the cache, and HF_HUB_OFFLINE is set"
    how = offline if hub_client.offline() else hub_client.reason(error)
    return ModelError(f"{source} is not here and cannot be fetched: {how}")
