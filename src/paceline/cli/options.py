"""Options that several verbs share, and the small languages in them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.errors import MethodError, RequestError

if TYPE_CHECKING:
    from paceline.control.base import ControlMethod
    from paceline.control.grammar import Grammar
    from paceline.control.keywords import Keywords
    from paceline.drafters.base import DraftMethod
    from paceline.lm import LM
    from paceline.watermarks.base import Watermark as Mark

_DRAFTERS_HELP = (
    "Drafters, separated by ';' or ','; repeatable. A ',' before KEY=VALUE continues the settings "
    "of the drafter before it: 'recycle:tree=paper,k=8,lookup' names two. "
    "'all' names every exact one that needs nothing else."
)

Model = Annotated[str, typer.Argument(help="Folder or hub id of a checkpoint.")]
Models = Annotated[
    str, typer.Argument(help="Folder or hub id of a checkpoint; 'A@0.7|B@0.3' is an ensemble.")
]
ModelOption = Annotated[
    str | None, typer.Option(help="As in `paceline bench`; the embedded checkpoint if left out.")
]
Drafter = Annotated[str, typer.Option(help="NAME[:key=value,...]; see `paceline methods`.")]
Drafters = Annotated[list[str], typer.Option(help=_DRAFTERS_HELP)]
Strategy = Annotated[
    str | None,
    typer.Option(
        help="Search instead: NAME[:key=value,...], e.g. beam:width=4; see `paceline methods`."
    ),
]
Budget = Annotated[
    str,
    typer.Option(
        help="Most nodes of a tree beyond its root; 0 is plain, auto sizes by measured cost."
    ),
]
Engine = Annotated[str, typer.Option(help="auto, native or reference.")]
Device = Annotated[str | None, typer.Option(help="Of the reference engine, e.g. cuda.")]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="Of the weights: fp32, bf16, fp16, int8, int4, ternary; auto: as stored. "
        "',head=FORMAT' after it is that of embedding and head.",
    ),
]
Learnt = Annotated[
    Path | None,
    typer.Option(
        help="What the drafter learnt: read from this file if it exists, kept there at the end."
    ),
]
KvFormat = Annotated[
    str, typer.Option(help="Of cached keys and values: fp32, fp16, int8; auto: fp32.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Of the native engine; all usable cores.")
]
NewTokens = Annotated[int, typer.Option(min=1, help="Upper limit of an answer, in tokens.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy; the checkpoint's default if left out.")
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text, whatever the drafter.")]
Sampler = Annotated[
    str | None,
    typer.Option(
        help="NAME=VALUE,... e.g. 'min_p=0.05,temperature=0.8,dry=0.8,dry.allowed=3'; "
        "see `paceline methods`."
    ),
]
Guide = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME:key=value,... another model or text that steers the output, e.g. "
        "'cfg:negative=A sad story,scale=1.5'; repeatable where an order is defined; "
        "see `paceline methods`."
    ),
]
JsonSchema = Annotated[
    Path | None, typer.Option(help="A file with a JSON schema that the output follows.")
]
Regex = Annotated[str | None, typer.Option(help="A regular expression that the output matches.")]
GrammarFile = Annotated[
    Path | None, typer.Option("--grammar", help="A file with Lark rules that the output follows.")
]
Choice = Annotated[str | None, typer.Option(help="The output is one of these: yes|no|maybe.")]
Words = Annotated[
    str | None,
    typer.Option("--keywords", help="Words that the output has, in any order: dog,ice cream."),
]
Hmm = Annotated[
    Path | None, typer.Option("--hmm", help="Of `paceline distil-hmm`; leads to the keywords.")
]
ToolsFile = Annotated[
    Path | None,
    typer.Option(
        "--tools",
        help="A file with functions that the model may call: a JSON list, as OpenAI's API takes "
        "it. --chat offers them to the model.",
    ),
]
ToolChoice = Annotated[
    str, typer.Option(help="auto, none, required, or the name of the tool to call.")
]
Walk = Annotated[
    str,
    typer.Option(
        help="gumbel: the tokens of plain decoding; rejection: its law only, for draft models."
    ),
]
Watermark = Annotated[
    str | None,
    typer.Option(
        help="key=SECRET[,kind=exponential|inverse|green|synthid][,SETTING=VALUE]; "
        "see `paceline methods`."
    ),
]
Stop = Annotated[list[str] | None, typer.Option(help="Ends the text; repeatable.")]
Prompts = Annotated[
    Path,
    typer.Option(
        help="A .jsonl file with `prompt` or `turns` (and `category`), or a prompt a line."
    ),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Only the first N lines; all turns of a line count.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Use the checkpoint's chat template.")]
Out = Annotated[Path | None, typer.Option(help="Write the JSON document to this file, too.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]


@dataclass(frozen=True)
class EngineChoice:
    """The options that choose an engine."""

    engine: str
    device: str | None
    threads: int | None
    weight_format: str
    kv_format: str

    def open(self, model: str | None, drafter: str = "plain", budget: int | str = 16) -> LM:
        """A model in that engine."""
        from paceline.lm import LM

        return LM(
            model,
            engine=self.engine,
            drafter=drafter,
            budget=budget,
            threads=self.threads,
            device=self.device,
            format=self.weight_format,
            kv_format=self.kv_format,
        )


def split_drafters(texts: Sequence[str]) -> list[str]:
    """The drafters that `--drafters` names, each once; see its help for the syntax."""
    found: list[str] = []
    for text in texts:
        for group in text.split(";"):
            names: list[str] = []
            for item in filter(None, map(str.strip, group.split(","))):
                if names and "=" in item.partition(":")[0]:
                    names[-1] += f",{item}"
                else:
                    names.append(item)
            found += names
    return list(dict.fromkeys(found))


def find_drafters(texts: Sequence[str]) -> tuple[dict[str, DraftMethod], list[str]]:
    """The drafters by name, and those of `all` that were left out because they need something.

    Raises:
        MethodError: unknown name or setting, or none named.
    """
    from paceline.core import Exactness
    from paceline.registry import drafters, required

    names: list[str] = []
    left_out: list[str] = []
    for name in split_drafters(texts):
        if name != "all":
            names.append(name)
            continue
        for known, method in drafters.methods().items():
            if method.exactness is Exactness.EXACT and not method.hidden:
                (left_out if method.needs or required(method) else names).append(known)
    found: dict[str, DraftMethod] = {name: drafters.parse(name) for name in names}
    if not found:
        raise MethodError("no drafter is named; see `paceline methods`")
    return found, left_out


def lossy(methods: Mapping[str, DraftMethod]) -> list[str]:
    """The names of those that may change the output."""
    from paceline.core import Exactness

    return [name for name, method in methods.items() if method.exactness is Exactness.LOSSY]


def parse_sampler(text: str | None) -> tuple[list[ControlMethod] | None, float | None]:
    """Controls of `--sampler`, temperature apart; None where it was not given.

    Raises:
        MethodError: unknown control or setting.
        RequestError: a value out of range, or not a number.
    """
    from paceline.control.sampling import Sampling

    if text is None:
        return None, None
    found = Sampling.parse(text)
    return list(found.methods), found.temperature


def one_watermark(text: str | None) -> Mark | None:
    """The watermark that `--watermark` names.

    Raises:
        PacelineError: what is missing, unknown or out of range.
    """
    from paceline.watermarks.base import parse_watermark

    return None if text is None else parse_watermark(text)


def one_grammar(
    schema: Path | None, regex: str | None, grammar: Path | None, choice: str | None
) -> Grammar | None:
    """The grammar that one of the four options gives.

    Raises:
        PacelineError: there are several, or it cannot be read.
    """
    from paceline.control.grammar import Grammar

    if sum(option is not None for option in (schema, regex, grammar, choice)) > 1:
        raise RequestError(
            "give one of --json-schema, --regex, --grammar and --choice; an output follows one"
        )
    if schema is not None:
        return Grammar(read_text("the JSON schema", schema), "json")
    if regex is not None:
        return Grammar(regex)
    if grammar is not None:
        return Grammar(read_text("the grammar", grammar), "lark")
    return None if choice is None else Grammar.choice(choice.split("|"))


def keywords(words: str | None, hmm: Path | None) -> Keywords | None:
    """What `--keywords` and `--hmm` ask for.

    Raises:
        PacelineError: a word is missing.
    """
    from paceline.control.keywords import Keywords

    if words is None:
        if hmm is not None:
            raise MethodError("--hmm leads to keywords, and none are given; add --keywords")
        return None
    return Keywords.of(words.split(","), hmm="" if hmm is None else str(hmm))


def read_tools(path: Path | None, choice: str) -> list[Any]:
    """The tools that `--tools` names.

    Raises:
        RequestError: it cannot be read, holds no JSON list, or there is a choice without it.
    """
    if path is None:
        if choice not in ("auto", "none"):
            raise RequestError(f"--tool-choice is {choice}, but there are no --tools; name a file")
        return []
    try:
        found = json.loads(read_text("the tools", path))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {error!s:.100}") from None
    if not isinstance(found, list) or not found:
        raise RequestError(f"{path} holds no JSON list of tools")
    return found


def read_text(what: str, path: Path) -> str:
    """The UTF-8 text of a file; `what` it holds is for the error.

    Raises:
        RequestError: it cannot be read, or is not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RequestError(f"cannot read {what} in {path}: {error.strerror}") from None


def one_temperature(option: float | None, sampler: float | None) -> float | None:
    """The temperature that `--temperature` and `--sampler` agree on.

    Raises:
        RequestError: they do not.
    """
    if option is not None and sampler is not None and option != sampler:
        raise RequestError(
            f"--temperature is {option:g} and --sampler says {sampler:g}; give one of them"
        )
    return sampler if option is None else option


def stops(texts: Sequence[str] | None) -> list[str]:
    """What `--stop` names.

    Raises:
        RequestError: one is empty.
    """
    if "" in (texts or ()):
        raise RequestError("--stop is empty, expected the text that ends the output")
    return list(texts or ())


def numbers(name: str, text: str) -> list[float]:
    """The numbers of a comma-separated list, each once.

    Raises:
        RequestError: one of them is none, is negative, or there is none.
    """
    from paceline.control.sampling import number

    found = [number(name, item) for item in text.split(",") if item.strip()]
    if not found or min(found) < 0:
        raise RequestError(f"{name} is {text!r}, expected numbers of 0 or more, with commas")
    return list(dict.fromkeys(found))


def limits(name: str, text: str) -> tuple[float, float]:
    """The two numbers of LOW..HIGH; a single one is both.

    Raises:
        RequestError: one of them is none.
    """
    from paceline.control.sampling import number

    low, dots, high = text.partition("..")
    return number(name, low), number(name, high if dots else low)


def whole_limits(name: str, text: str) -> tuple[int, int]:
    """The same in whole numbers.

    Raises:
        RequestError: one of them is none.
    """
    low, high = limits(name, text)
    if low != int(low) or high != int(high):
        raise RequestError(f"{name} is {text!r}, expected whole numbers, as in 1..16")
    return int(low), int(high)


def one_budget(text: str) -> int | str:
    """A number of nodes, or `auto`.

    Raises:
        RequestError: neither.
    """
    found = text.strip()
    if found == "auto":
        return found
    if not (found.isascii() and found.isdecimal() and len(found) < 5 and int(found) <= 4096):
        raise RequestError(f"--budget is {found!r}, expected 0 to 4096 nodes, or auto")
    return int(found)


def budgets(text: str) -> list[int | str]:
    """The budgets of a comma-separated list, each once.

    Raises:
        RequestError: one is neither 0 to 4096 nor `auto`, or there is none.
    """
    return list(dict.fromkeys(one_budget(item) for item in text.split(",")))
