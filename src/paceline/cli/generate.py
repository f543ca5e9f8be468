"""`paceline generate`: one prompt, its continuation as it comes, and what it cost."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli import decode_options, options, search
from paceline.cli.conversation.screen import dim
from paceline.cli.decode_options import describe, silence, sizing, stream, summary
from paceline.cli.files import read_prediction, read_prompt, read_tools
from paceline.cli.format_hint import hint_formats
from paceline.cli.output import document, say
from paceline.cli.plan_options import PlanOptions
from paceline.compatibility import Side
from paceline.compatibility import check as check_sides
from paceline.errors import MethodError

if TYPE_CHECKING:
    from paceline.control.keywords import Keywords
    from paceline.core import Output, Request
    from paceline.lm import LM, Prompt, RequestOptions


@dataclass(frozen=True)
class PredictionDraftOptions(decode_options.LearningDraftOptions):
    """Drafting."""

    prediction: Annotated[
        Path | None,
        typer.Option(
            help="A file with the text that the output will largely be, for --drafter "
            "predicted_output."
        ),
    ] = None

    def expected(self) -> str | None:
        """Return the text that the output is expected to be, None if none is given.

        Raises:
            RequestError: the file cannot be read, or is empty.
        """
        return None if self.prediction is None else read_prediction(self.prediction)


@dataclass(frozen=True)
class LexicalOptions(options.ConstraintOptions):
    """Constraints."""

    keywords: Annotated[
        str | None,
        typer.Option(
            help="Words that the output must contain, in any order: dog,ice cream; one with a "
            "comma in quotation marks."
        ),
    ] = None
    hmm: Annotated[
        Path | None,
        typer.Option(help="File of `paceline distil-hmm`, which leads the output to the keywords."),
    ] = None
    tools: Annotated[
        Path | None,
        typer.Option(
            help="A file with functions that the model may call: a JSON list, as OpenAI's API "
            "takes it. --chat offers them to the model."
        ),
    ] = None
    tool_choice: Annotated[
        str, typer.Option(help="auto, none, required, or the name of the tool to call.")
    ] = "auto"

    def words(self) -> Keywords | None:
        """Return the control that `--keywords` and `--hmm` name.

        Raises:
            PacelineError: a word is missing.
        """
        from paceline.control.keywords import Keywords
        from paceline.method_spec import split_quoted, unquoted

        if self.keywords is None:
            if self.hmm is not None:
                raise MethodError("--hmm leads to keywords, and none are given; add --keywords")
            return None
        words = map(unquoted, split_quoted(self.keywords, ","))
        return Keywords.of(words, hmm="" if self.hmm is None else str(self.hmm))

    def request_options(self) -> RequestOptions:
        """Return the options of `LM.request`.

        Raises:
            PacelineError: what is wrong and what to do.
        """
        return {
            **super().request_options(),
            "keywords": self.words(),
            "tools": read_tools(self.tools, self.tool_choice),
            "tool_choice": self.tool_choice,
        }


Strategy = Annotated[
    str | None,
    typer.Option(
        help="Search instead: NAME[:key=value,...], e.g. beam:width=4; see `paceline methods`."
    ),
]
Check = Annotated[
    bool, typer.Option("--check", help="Decode plainly as well and compare; exit 1 if different.")
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Keep generating after end-of-text.")]


CHAT_HINT = "this model is tuned for chat; --chat asks it in its own format"


def generate(
    context: typer.Context,
    prompt: options.Text = None,
    model: options.ModelOption = None,
    *,
    sampling: options.SamplingOptions,
    constraints: LexicalOptions,
    drafting: PredictionDraftOptions,
    engine: options.EngineOptions,
    plan: PlanOptions,
    prefixes: options.PrefixCacheOptions,
    documents: options.DocumentOptions,
    filters: options.PromptFilterOptions,
    strategy: Strategy = None,
    chat: options.Chat = False,
    ignore_eos: IgnoreEos = False,
    check: Check = False,
    json: options.Json = False,
) -> None:
    """Continue a text.

    Lexical controls: --keywords, and `letters`, `sounds` and `monitor` by --sampler, as in
    `--sampler letters=e`.
    """
    requested: RequestOptions = {
        **sampling.request_options(),
        **constraints.request_options(),
        **documents.request_options(),
        "ignore_eos": ignore_eos,
    }
    text, requested["prediction"] = read_prompt(prompt), drafting.expected()
    model, engine, drafting = plan.apply(context, model, engine, drafting)
    method = None if strategy is None else search.chosen(context, strategy)
    if method is not None and not method.drafts:
        drafting = replace(drafting, drafter="plain", budget="0")

    if method is not None and prefixes.prefix_cache_dir is not None:
        searching, stored = f"the strategy {method.name}", "--prefix-cache-dir"
        check_sides({Side.SEARCH: searching, Side.STORED_PREFIXES: stored})
    lm = drafting.open(engine, model)
    prefixes.open(lm)
    documents.open(lm)
    if not chat and lm.tokenizer.template is not None:
        say(CHAT_HINT)
    messages: Prompt = [{"role": "user", "content": text}] if chat else text
    filtered = filters.filtered(lm, messages)
    if filtered is not None:
        sides = {Side.FILTERED_PROMPT: "--prompt-keep"}
        if requested["documents"]:
            check_sides(sides | {Side.DOCUMENTS: "--document"})
        if requested["tools"]:
            check_sides(sides | {Side.TOOLS: "--tools"})
        say(f"kept {len(filtered.tokens)} of the prompt's {filtered.length} tokens")
        messages = filtered.tokens
    if method is not None:
        outputs = lm.search(messages, method, **requested)
        drafting.keep(lm)
        explain_silence(lm, "".join(output.text for output in outputs), chat)
        search.deliver(lm, method.name, outputs, json)
        return
    request = lm.request(messages, **requested)
    request = request if filtered is None else replace(request, continues=not chat)
    if check and request.walk != "gumbel" and request.temperature > 0:
        check_sides({Side.REJECTION: "--walk rejection", Side.COMPARISON: "--check"})
    if not json:
        echo(text)
    output = stream(lm, request, quiet=json)
    drafting.keep(lm)
    record = describe(lm, request, output, drafting, sampling)
    record["prompt_filter"] = filtered and {
        "length": filtered.length,
        "positions": list(filtered.positions),
        "text": filtered.text,
    }
    record["lossy"] |= filtered is not None and len(filtered.tokens) < filtered.length
    if output.finish not in ("interrupted", "context"):
        explain_silence(lm, output.text, chat)
    report(record, output)
    hint_formats(lm, engine.weight_format)
    if check and output.finish != "interrupted":
        record["check"] = checked(lm, request, output)
    if json:
        document(record)
    if output.finish == "interrupted":
        raise typer.Exit(130)
    if not record.get("check", {"identical": True})["identical"]:
        raise typer.Exit(1)


def explain_silence(lm: LM, text: str, chat: bool) -> None:
    """Say on stderr why nothing was printed, where that is so."""
    reason = silence(lm, text, chat)
    if reason is not None:
        say(reason)


def echo(prompt: str) -> None:
    """Show the prompt on a terminal, faintly, in front of the text."""
    if sys.stderr.isatty():
        sys.stderr.write(dim(prompt))
        sys.stderr.flush()


def report(record: dict[str, Any], output: Output) -> None:
    """Print cost, the governor's decisions and a warning if lossy, a line each."""
    say(summary(output))
    if record["governor"]:
        say(sizing(record["governor"]))
    if record["lossy"]:
        policy = record["kv_policy"]
        what = record["drafter"] if policy is None else f"the KV policy {policy}"
        if record["documents"]:
            what = "a prompt with documents computed apart"
        if record["prompt_filter"]:
            what = "a filtered prompt"
        say(f"{what} is lossy: this is not what plain decoding writes")


def checked(lm: LM, request: Request, output: Output) -> dict[str, Any]:
    """Decode plainly and say whether the output is the same."""
    from paceline.decoding.governor import Fixed
    from paceline.measuring.baseline import decode, plain_drafter
    from paceline.measuring.proof import compare
    from paceline.measuring.report.document import difference_document

    plain = decode(lm, plain_drafter(lm), request, Fixed(0), margins=True)
    difference = compare(lm, request, plain, output)
    if difference is None:
        speed = plain.tokens_per_second
        times = f", at {output.tokens_per_second / speed:.2f} times its speed" if speed else ""
        say(f"identical to plain decoding{times}")
        return {"identical": True, "plain_tokens_per_second": plain.tokens_per_second}
    say(f"differs from plain decoding at {difference}")
    return {"identical": False, "first": difference_document(difference)}
