"""`paceline generate`: one prompt, its continuation as it comes, and what it cost."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli import options, search
from paceline.cli.output import check_target, document, say, write
from paceline.errors import MethodError, RequestError

if TYPE_CHECKING:
    from paceline.core import Output, Request
    from paceline.lm import LM, Options, Prompt

OTHER_TOKENS = (
    "--walk rejection keeps the law of the output, not its tokens: no output can be compared with "
    "plain decoding's; leave --check out, or use --walk gumbel"
)
OPENING = "Once upon a time there was"
_STDIN_LIMIT = 64 << 20  # bytes; longer than any model's context


def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - reads it from stdin.")
    ] = None,
    model: options.ModelOption = None,
    drafter: options.Drafter = "blend",
    budget: options.Budget = "auto",
    engine: options.Engine = "auto",
    weight_format: options.Format = "auto",
    kv_format: options.KvFormat = "auto",
    device: options.Device = None,
    threads: options.Threads = None,
    max_new_tokens: options.NewTokens = 256,
    temperature: options.Temperature = None,
    seed: options.Seed = 0,
    sampler: options.Sampler = None,
    guide: options.Guide = None,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    grammar: options.GrammarFile = None,
    choice: options.Choice = None,
    keywords: options.Words = None,
    hmm: options.Hmm = None,
    tools: options.ToolsFile = None,
    tool_choice: options.ToolChoice = "auto",
    watermark: options.Watermark = None,
    walk: options.Walk = "gumbel",
    strategy: options.Strategy = None,
    stop: options.Stop = None,
    learnt: options.Learnt = None,
    prediction: Annotated[
        Path | None,
        typer.Option(help="A file with what the output may mostly be; for --drafter phrases."),
    ] = None,
    chat: options.Chat = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Decode plainly, too, and compare; exit 1 if different.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Continue a text."""
    controls, heat = options.parse_sampler(sampler)
    heat = options.one_temperature(temperature, heat)
    follows = options.one_grammar(json_schema, regex, grammar, choice)
    wanted = options.keywords(keywords, hmm)
    functions = options.read_tools(tools, tool_choice)
    mark = options.one_watermark(watermark)
    text, ends = read_prompt(prompt), options.stops(stop)
    nodes = options.one_budget(budget)
    expected = None if prediction is None else read_prediction(prediction)

    method = None if strategy is None else search.chosen(context, strategy)
    if method is not None and not method.drafts:
        drafter, nodes = "plain", 0

    chosen = options.EngineChoice(engine, device, threads, weight_format, kv_format)
    lm = chosen.open(model, drafter, nodes)
    recall(lm, learnt)
    asked: Prompt = [{"role": "user", "content": text}] if chat else text
    wishes: Options = {
        "max_new_tokens": max_new_tokens,
        "temperature": heat,
        "seed": seed,
        "controls": controls,
        "grammar": follows,
        "keywords": wanted,
        "guide": guide or (),
        "tools": functions,
        "tool_choice": tool_choice,
        "stop": ends,
        "ignore_eos": ignore_eos,
        "prediction": expected,
        "walk": walk,
        "watermark": mark,
    }
    if method is not None:
        outputs = lm.search(asked, method, **wishes)
        keep(lm, learnt)
        search.deliver(lm, method.name, outputs, json)
        return
    request = lm.request(asked, **wishes)
    if check and walk != "gumbel" and request.temperature > 0:
        raise MethodError(OTHER_TOKENS)
    if not json and sys.stderr.isatty():
        sys.stderr.write(f"\x1b[2m{text}\x1b[0m")
        sys.stderr.flush()
    output = stream(lm, request, quiet=json)
    keep(lm, learnt)
    found = {**describe(lm, request, output, drafter, nodes), "watermark": mark and mark.name}
    say(summary(output))
    if found["governor"]:
        say(sizing(found["governor"]))
    if found["lossy"]:
        say(f"{drafter} is lossy: this is not what plain decoding writes")
    if check and output.finish != "interrupted":
        found["check"] = checked(lm, request, output)
    if json:
        document(found)
    if output.finish == "interrupted":
        raise typer.Exit(130)
    if not found.get("check", {"identical": True})["identical"]:
        raise typer.Exit(1)


def read_prompt(prompt: str | None) -> str:
    """The prompt, from stdin where it is `-`.

    Raises:
        RequestError: it is empty, or stdin is not text.
    """
    text = OPENING if prompt is None else prompt
    if prompt == "-":
        try:
            text = sys.stdin.buffer.read(_STDIN_LIMIT).decode()
        except UnicodeDecodeError as error:
            raise RequestError(f"stdin is not UTF-8 text (byte {error.start})") from None
    if not text:
        raise RequestError("the prompt is empty; give some text, or leave it out for a story")
    return text


def read_prediction(path: Path) -> str:
    """The text that the output is expected to be.

    Raises:
        RequestError: it cannot be read, is not text, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RequestError(f"cannot read the prediction in {path}: {error.strerror}") from None
    if not text:
        raise RequestError(f"the prediction in {path} is empty; give some text, or leave it out")
    return text


def recall(lm: LM, learnt: Path | None) -> None:
    """Let the drafter go on from the file that `--learnt` names, if it is there."""
    check_target(learnt)
    if learnt is not None and not lm.drafter.state():
        raise MethodError("this drafter learns nothing that could be kept; leave --learnt out")
    if learnt is not None and learnt.exists():
        lm.load_learnt(learnt)


def keep(lm: LM, learnt: Path | None) -> None:
    """Keep what the drafter learnt in the file that `--learnt` names."""
    if learnt is not None:
        lm.save_learnt(learnt)


def stream(lm: LM, request: Request, quiet: bool) -> Output:
    """Decode, with the text on stdout as it comes unless `quiet`; Ctrl-C keeps what there is."""
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
    """One line: how much, how fast, in how few passes, and what drafting cost."""
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


def sizing(report: dict[str, Any]) -> str:
    """One line: what a governor did, and why."""
    drafted = [int(nodes) for nodes in report["sizes"] if nodes != "1"]
    trees = f", trees of up to {max(drafted)} nodes" if drafted else ""
    probes = f", {report['probes']} to probe" if report["probes"] else ""
    plain = f"{report['plain_passes']} of {report['passes']} passes plain"
    return f"budget auto: {plain}{trees}{probes}; {report['reason']}"


def describe(
    lm: LM, request: Request, output: Output, drafter: str, budget: int | str
) -> dict[str, Any]:
    """The JSON of one output."""
    from paceline.decoding.governor import Governor

    seconds = output.seconds
    return {
        "text": output.text,
        "tokens": output.tokens,
        "prompt_tokens": len(request.prompt),
        "new_tokens": len(output.tokens),
        "passes": output.passes,
        "tokens_per_pass": output.tokens_per_pass,
        "seconds": asdict(seconds),
        "tokens_per_second": output.tokens_per_second,
        "finish": output.finish,
        "tool_calls": [asdict(call) for call in output.tool_calls],
        "engine": lm.engine.name,
        "format": lm.engine.format,
        "kv_format": lm.engine.kv_format,
        "drafter": drafter,
        "budget": budget,
        "governor": lm.budget.report() if isinstance(lm.budget, Governor) else None,
        "temperature": request.temperature,
        "seed": request.seed,
        "walk": request.walk,
        "lossy": lm.drafter.rollback is not None,
    }


def checked(lm: LM, request: Request, output: Output) -> dict[str, Any]:
    """Decode plainly and say whether the output is the same."""
    from paceline.decoding.governor import Fixed
    from paceline.measuring.proof import compare
    from paceline.measuring.report import difference_document
    from paceline.measuring.turns import decode, plain_drafter

    plain = decode(lm, plain_drafter(lm), request, Fixed(0), margins=True)
    difference = compare(lm, request, plain, output)
    if difference is None:
        say("identical to plain decoding")
        return {"identical": True, "plain_tokens_per_second": plain.tokens_per_second}
    say(f"differs from plain decoding at {difference}")
    return {"identical": False, "first": difference_document(difference)}
