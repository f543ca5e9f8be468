"""`paceline convert`: write a model as a GGUF file or as a safetensors folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import options
from paceline.cli.output import document, say
from paceline.cli.progress import counting_bytes
from paceline.errors import RequestError

if TYPE_CHECKING:
    from paceline.models import Model
    from paceline.models.export.gguf import GGUFExport
    from paceline.models.export.lossless import LosslessExport, Sizes
    from paceline.models.export.safetensors import SafetensorsExport

    Export = GGUFExport | SafetensorsExport | LosslessExport

_FORMAT_HELP = (
    "GGUF: q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k q4_k q5_k q6_k iq4_nl iq4_xs tq1_0 tq2_0 bf16 f16 "
    "f32, or a mix: q2_k_m q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m; `q4_k:head=q8_0` "
    "sets embedding and head. Folder: bf16 f16 f32, or compressed-tensors for the integers of a "
    "compressed model. auto keeps what the model has."
)


def convert(
    model: options.Model,
    out: Annotated[
        Path, typer.Argument(help="A file that ends in .gguf, or a folder for safetensors.")
    ],
    *,
    weight_format: Annotated[str, typer.Option("--format", help=_FORMAT_HELP)] = "auto",
    lossless: Annotated[
        bool,
        typer.Option(
            "--lossless",
            help="Pack floating-point matrices bit for bit into fewer bytes, in a folder that "
            "Paceline reads.",
        ),
    ] = False,
    memory: options.Memory = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a GGUF file.")] = False,
    json: options.Json = False,
) -> None:
    """Write a model in another format: GGUF for llama.cpp, safetensors for transformers.

    The tokenizer, the chat template and the sampling defaults come along. A model that the format
    cannot describe is refused before anything is written, and no half-written file is left.
    """
    from paceline.models import load
    from paceline.models.nested import parse_memory

    size = None if memory is None else parse_memory("--memory", memory)
    opened = load(model, size)
    _check_target(out, opened.path, overwrite)
    export = _prepare(opened, out, weight_format, lossless)
    rounds = not lossless and "roundedinputs" in opened.weights.formats()
    start = perf_counter()
    with counting_bytes(export.nbytes, "converting") as tick:
        size = export.write(out, tick)
    seconds = perf_counter() - start
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(export.types.items()))
    say(f"wrote {out}, {size / 1e6:.1f} MB in {seconds:.1f} s: {listed} tensors")
    sizes: Sizes | None = getattr(export, "sizes", None)
    if sizes:
        say(_packing(sizes, size))
    for (wanted, kind), count in export.fallbacks.items():
        what = "matrix is" if count == 1 else "matrices are"
        say(f"{count} {what} {kind} instead of {wanted}: rows are no whole blocks of {wanted}")
    if rounds:
        export.notes.append(
            "activations, which the source rounds, are rounded no more: outputs differ"
        )
    for note in export.notes:
        say(note)
    if json:
        document(
            {
                "path": str(out),
                "bytes": size,
                "types": dict(export.types),
                "fallbacks": [
                    {"wanted": wanted, "type": kind, "tensors": count}
                    for (wanted, kind), count in export.fallbacks.items()
                ],
                "notes": export.notes,
                "seconds": seconds,
            }
            | ({"lossless": asdict(sizes)} if sizes else {})
        )


def _packing(sizes: Sizes, size: int) -> str:
    """Return a sentence that says what packing came to."""
    if not sizes.packed:
        return "no floating-point matrix became smaller"
    speed = sizes.packed_source / sizes.unpack_seconds / 1e9
    return (
        f"{size / sizes.source:.3f} of the {sizes.source / 1e6:.1f} MB of the source; unpacking "
        f"takes {sizes.unpack_seconds:.2f} s when it is loaded, {speed:.1f} GB/s"
    )


def _prepare(model: Model, out: Path, weight_format: str, lossless: bool) -> Export:
    """Return what will be written, everything checked.

    Raises:
        RequestError: `lossless` with something that it cannot go with.
    """
    from paceline.models.export.compressed_tensors import NAME as COMPRESSED_TENSORS
    from paceline.models.export.compressed_tensors import CompressedTensorsExport
    from paceline.models.export.gguf import GGUFExport
    from paceline.models.export.gguf_types import parse_gguf_format
    from paceline.models.export.lossless import LosslessExport
    from paceline.models.export.safetensors import SafetensorsExport

    if lossless:
        if weight_format != "auto":
            raise RequestError(
                f"--lossless keeps every type as it is and --format {weight_format} changes it; "
                "convert to that format first, then pack the result"
            )
        if out.suffix == ".gguf":
            raise RequestError("GGUF has no packed numbers; name a folder to use --lossless")
        return LosslessExport(model)
    if out.suffix == ".gguf":
        return GGUFExport(model, parse_gguf_format(weight_format))
    if weight_format.partition(":")[0] == COMPRESSED_TENSORS:
        return CompressedTensorsExport(model, weight_format)
    return SafetensorsExport(model, weight_format)


def _check_target(out: Path, source: Path, overwrite: bool) -> None:
    """Refuse to write over something, before the work begins.

    Raises:
        RequestError: what is there.
    """
    if out.suffix == ".gguf" and out.is_dir():
        raise RequestError(f"{out} is a folder, expected the name of a new file")
    if out.suffix != ".gguf" and out.is_file():
        raise RequestError(f"{out} is a file; name a file that ends in .gguf, or a new folder")
    inside = source if source.is_dir() else source.parent
    if out.resolve() in (source.resolve(), inside.resolve()):
        raise RequestError(f"{out} is where the model itself lies; name another place")
    if out.is_dir() and any(out.iterdir()):
        raise RequestError(f"{out} exists already and is not empty; name a new folder")
    if out.is_file() and not overwrite:
        raise RequestError(f"{out} exists already; name another file, or add --overwrite")
