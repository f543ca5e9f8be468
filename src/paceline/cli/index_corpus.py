"""`paceline index-corpus`: a corpus for `--drafter datastore:path=FILE`."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.output import check_target, document, say
from paceline.cli.progress import counting
from paceline.errors import RequestError

_ALL, _GENERAL = 10_000_000, 5_000_000  # tokens: 80 MB, 40 MB


def index_corpus(
    model: options.Model,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="[CORPUS...] OUT",
            help="Texts: .jsonl with `text` a line, or plain; perhaps compressed (.gz, .xz). "
            "The last name is the file to write.",
        ),
    ],
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of tokens; the file has 8 bytes for each. Default 10,000,000, "
            "with --general 5,000,000.",
        ),
    ] = None,
    general: Annotated[
        bool,
        typer.Option(
            "--general",
            help="Take general text from this machine: documentation and code of Python and of "
            "installed packages. Texts that are named come first.",
        ),
    ] = False,
    json: options.Json = False,
) -> None:
    """Tokenise a corpus and sort its suffixes, so that `datastore` can draft from it."""
    *corpus, out = files
    if not corpus and not general:
        raise RequestError(
            f"{out} is the file to write, and no text is named; name some before it, or --general"
        )
    check_target(out)
    for path in corpus:
        if not path.is_file():
            raise RequestError(f"cannot read {path}: it is not a file")
        if out.exists() and path.samefile(out):
            raise RequestError(f"{out} is a text to read; name another file to write")
    from paceline.drafters.history.corpus_index import tokenise, write_corpus
    from paceline.drafters.history.general_text import general_texts
    from paceline.models import load

    tokenizer = load(model).tokenizer
    limit = max_tokens or (_GENERAL if general else _ALL)
    start = perf_counter()
    total = 0 if general else sum(path.stat().st_size for path in corpus)
    with counting(total, "bytes") as tick:
        read = tokenise(corpus, tokenizer, limit, tick, general_texts() if general else ())
    tokenised = perf_counter()
    write_corpus(out, read.tokens, tokenizer)
    sorted_ = perf_counter()
    size = out.stat().st_size
    if not read.complete:
        say(f"stopped at {limit} tokens, before the end of the texts; see --max-tokens")
    say(
        f"wrote {out}, {size / 1e6:.1f} MB: {len(read.tokens)} tokens, {read.documents} documents "
        f"({tokenised - start:.1f} s to tokenise, {sorted_ - tokenised:.1f} s to sort and write)"
    )
    if json:
        document(
            {
                "path": str(out),
                "bytes": size,
                "tokens": len(read.tokens),
                "documents": read.documents,
                "complete": read.complete,
                "seconds": {"tokenise": tokenised - start, "sort": sorted_ - tokenised},
            }
        )
