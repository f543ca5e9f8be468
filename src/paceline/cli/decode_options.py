"""One answer of `generate` and `chat`: drafted, as it comes, and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli import options
from paceline.cli.output import check_target, write
from paceline.errors import MethodError

if TYPE_CHECKING:
    from paceline.core import Output, Request
    from paceline.lm import LM


@dataclass(frozen=True)
class LearningDraftOptions(options.DraftOptions):
    """Drafting."""

    learnt: Annotated[
        Path | None,
        typer.Option(
            help="File with what the drafter learned: read if it exists, written at the end."
        ),
    ] = None

    def open(self, engine: options.EngineOptions, model: str | None) -> LM:
        """Open a model whose drafter starts from the file that `--learnt` names, if it exists.

        Raises:
            MethodError: the drafter learns nothing.
        """
        check_target(self.learnt)
        lm = engine.open(model, self.drafter, self.nodes)
        if self.learnt is not None and not lm.drafter.state():
            raise MethodError("this drafter learns nothing that could be kept; leave --learnt out")
        if self.learnt is not None and self.learnt.exists():
            lm.load_learnt(self.learnt)
        return lm

    def keep(self, lm: LM) -> None:
        """Write what the drafter learned to the file that `--learnt` names."""
        if self.learnt is not None:
            lm.save_learnt(self.learnt)


def stream(lm: LM, request: Request, quiet: bool) -> Output:
    """Decode, printing the text as it comes unless `quiet`; Ctrl-C ends the output early."""
    generation = lm.stream(request)
    try:
        for piece in generation:
            if not quiet:
                write(piece)
    except KeyboardInterrupt:  # while the text was being written
        generation.output.finish = "interrupted"
    if not quiet:
        write("\n")
    return generation.output


def summary(output: Output) -> str:
    """Return one line: tokens, speed, tokens per pass, and the share of time spent drafting."""
    seconds = output.seconds
    drafting = seconds.draft / seconds.decode if seconds.decode else 0.0
    guiding = f", {seconds.guide / seconds.decode:.0%} guiding" if seconds.guide else ""
    ends = {
        "context": "; the model's context is full",
        "interrupted": "; interrupted",
    }
    return (
        f"{len(output.tokens)} tokens, {output.tokens_per_second:.1f} tokens/s, "
        f"{output.tokens_per_pass:.2f} tokens per pass, {drafting:.0%} of the time drafting"
        f"{guiding}{ends.get(output.finish, '')}"
    )


def silence(lm: LM, text: str, chat: bool) -> str | None:
    """Return why nothing was printed and what helps; None if there is some text.

    Args:
        lm: the model.
        text: of all outputs.
        chat: whether the chat template was used.
    """
    if text.strip():
        return None
    said = "the model ended the text at once, so nothing is printed"
    if not chat and lm.tokenizer.template is not None:
        return f"{said}; it is tuned for chat: ask it with --chat, or go on with --ignore-eos"
    return f"{said}; ask in other words, or go on with --ignore-eos"


def sizing(report: dict[str, Any]) -> str:
    """Return one line: what a governor did, and why."""
    drafted = [int(nodes) for nodes in report["sizes"] if nodes != "1"]
    trees = f", trees of up to {max(drafted)} nodes" if drafted else ""
    probes = f", {report['probes']} to probe" if report["probes"] else ""
    plain = f"{report['plain_passes']} of {report['passes']} passes plain"
    return f"budget auto: {plain}{trees}{probes}; {report['reason']}"


def describe(
    lm: LM,
    request: Request,
    output: Output,
    drafting: options.DraftOptions,
    sampling: options.SamplingOptions,
) -> dict[str, Any]:
    """Return the JSON of one output."""
    from paceline.decoding.governor import Governor

    seconds = output.seconds
    return {
        "text": output.text,
        "tokens": output.tokens,
        "prompt_tokens": len(request.prompt),
        "cached_tokens": output.cached_tokens,
        "new_tokens": len(output.tokens),
        "passes": output.passes,
        "tokens_per_pass": output.tokens_per_pass,
        "seconds": asdict(seconds),
        "tokens_per_second": output.tokens_per_second,
        "finish": output.finish,
        "tool_calls": [call._asdict() for call in output.tool_calls],
        "engine": lm.engine.name,
        "format": lm.engine.format,
        "kv_format": lm.engine.kv_format,
        "drafter": drafting.drafter,
        "budget": drafting.nodes,
        "governor": lm.budget.report() if isinstance(lm.budget, Governor) else None,
        "temperature": request.temperature,
        "seed": request.seed,
        "walk": request.walk,
        "lossy": lm.drafter.rollback is not None or request.own_cache,
        "kv_policy": request.kv_policy and request.kv_policy.name,
        "documents": [] if request.documents is None else list(request.documents.sizes),
        "watermark": sampling.mark and sampling.mark.name,
    }
