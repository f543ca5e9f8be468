"""Cut files into pieces that a narrow way carries, and join them again by their sums.

    python benchmarks/gpu/pieces.py split FILE... FOLDER [--megabytes 60]
    python benchmarks/gpu/pieces.py join FOLDER OUT

`split` writes FILE.000, FILE.001, ... and `pieces.json`, which names them with their SHA-256.
`join` refuses pieces that are missing or changed, and leaves alone what it has joined before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

LIST = "pieces.json"


def sum_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split(files: list[Path], folder: Path, megabytes: float) -> None:
    """Write the pieces of files, and the list of them."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {}
    for path in files:
        pieces = {}
        with path.open("rb") as file:
            while block := file.read(int(megabytes * 1e6)):
                piece = folder / f"{path.name}.{len(pieces):03}"
                piece.write_bytes(block)
                pieces[piece.name] = sum_of(piece)
        known[path.name] = {"sha256": sum_of(path), "pieces": pieces}
        print(f"{path.name}: {len(pieces)} pieces")
    (folder / LIST).write_text(json.dumps(known, indent=1) + "\n")


def join(folder: Path, out: Path) -> None:
    """Write the files that the pieces in a folder make up."""
    try:
        known = json.loads((folder / LIST).read_text())
    except FileNotFoundError:
        sys.exit(f"{folder} has no {LIST}; `pieces.py split` writes it beside the pieces")
    out.mkdir(parents=True, exist_ok=True)
    for name, expected in known.items():
        path = out / name
        if path.exists() and sum_of(path) == expected["sha256"]:
            print(f"{path} is there")
            continue
        for piece, wanted in expected["pieces"].items():
            if not (folder / piece).exists():
                sys.exit(f"the piece {piece} is missing in {folder}; copy it there")
            if sum_of(folder / piece) != wanted:
                sys.exit(
                    f"the piece {piece} in {folder} has another sum than in {LIST}; copy it anew"
                )
        with path.open("wb") as file:
            for piece in expected["pieces"]:
                file.write((folder / piece).read_bytes())
        if sum_of(path) != expected["sha256"]:
            sys.exit(f"{path} has another sum than in {LIST}; split the file anew")
        print(f"{path} is whole")


def main() -> None:
    """Parse the command line, and split or join."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parts = parser.add_subparsers(dest="part", required=True)
    cut = parts.add_parser("split")
    cut.add_argument("files", type=Path, nargs="+")
    cut.add_argument("folder", type=Path)
    cut.add_argument("--megabytes", type=float, default=60)
    glue = parts.add_parser("join")
    glue.add_argument("folder", type=Path)
    glue.add_argument("out", type=Path)
    options = parser.parse_args()
    if options.part == "split":
        split(options.files, options.folder, options.megabytes)
    else:
        join(options.folder, options.out)


if __name__ == "__main__":
    main()
