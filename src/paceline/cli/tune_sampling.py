"""`paceline tune-sampling`: sampling settings that pay, within a budget of tokens."""

from __future__ import annotations

import json as jsons
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli import options, parsing
from paceline.cli.output import check_target, document, save, say
from paceline.cli.progress import counting
from paceline.errors import RequestError

if TYPE_CHECKING:
    from paceline.planning.sampling_search import SamplingSearch, SearchSpace, Trial
    from paceline.planning.scorers import Scorer

_LIMITS = "Range to search, LOW..HIGH."


@dataclass(frozen=True)
class ScoringOptions:
    """Scoring."""

    scorer: Annotated[
        str,
        typer.Option(
            help="exact: the text is the answer; regex: the answer is found in it; command: "
            "--command judges."
        ),
    ] = "exact"
    command: Annotated[
        str,
        typer.Option(
            help="Your own judge: reads the text, gets the answer as its last argument, prints "
            "0 to 1 or exits with 0."
        ),
    ] = ""
    per_question: Annotated[
        float, typer.Option(help="Maximum new tokens of all answers to a question, on average.")
    ] = 512.0

    def judge(self) -> Scorer:
        """Return the scorer of answers.

        Raises:
            RequestError: there is no such scorer, or no command.
        """
        from paceline.planning.scorers import scorer

        return scorer(self.scorer, self.command)


@dataclass(frozen=True)
class SearchOptions:
    """Search."""

    temperature: Annotated[str, typer.Option(help=_LIMITS)] = "0..1.5"
    top_p: Annotated[str, typer.Option(help=_LIMITS)] = "0.1..1"
    n: Annotated[str, typer.Option(help=f"{_LIMITS} Answers, of which the best counts.")] = "1..16"
    tokens: Annotated[str, typer.Option(help=f"{_LIMITS} Length of an answer.")] = "16..256"
    token_budget: Annotated[
        int, typer.Option(min=1, help="Maximum number of new tokens that all trials generate.")
    ] = 100_000
    seed: options.PlainSeed = 0

    def space(self) -> SearchSpace:
        """Return the limits of the search.

        Raises:
            RequestError: they are none.
        """
        from paceline.planning.sampling_search import SearchSpace

        return SearchSpace(
            parsing.limits("--temperature", self.temperature),
            parsing.limits("--top-p", self.top_p),
            parsing.whole_limits("--n", self.n),
            parsing.whole_limits("--tokens", self.tokens),
        )


Trials = Annotated[
    Path | None,
    typer.Option(help="File with the trials, written after each; continued if it exists."),
]


def tune_sampling(
    examples: Annotated[
        Path, typer.Argument(help="A .jsonl file with `prompt` and `answer` on each line.")
    ],
    model: options.ModelOption = None,
    *,
    scoring: ScoringOptions,
    search: SearchOptions,
    stop: options.Stop = None,
    chat: options.Chat = False,
    drafter: options.Drafter = "blend",
    engine: options.EngineOptions,
    out: Trials = None,
    json: options.Json = False,
) -> None:
    """Find temperature, top_p, number and length of answers that score best for their tokens.

    The score of a question is that of the best of its answers. From Python, see
    `paceline.planning.sampling_search`; there the scorer is any function.
    """
    from paceline.planning.sampling_search import SamplingSearch, read_examples, reader, writer

    check_target(out)
    judge, space = scoring.judge(), search.space()
    questions, ends = read_examples(examples), parsing.stops(stop)
    task: dict[str, Any] = {
        "model": model,
        "format": engine.weight_format,
        "kv_format": engine.kv_format,
        "examples": sha256(examples.read_bytes()).hexdigest(),
        **asdict(scoring),
        "space": jsons.loads(jsons.dumps(asdict(space))),
        "seed": search.seed,
        "stop": ends,
        "chat": chat,
    }
    trials = recall(out, task)
    lm = engine.open(model, drafter, "auto")
    write, read = writer(lm, chat, ends), reader(lm, ends)
    tuning = SamplingSearch(
        questions,
        write,
        read,
        judge,
        scoring.per_question,
        search.token_budget,
        space,
        search.seed,
        trials,
    )
    with counting(search.token_budget, "tokens") as tick:
        tick(tuning.spent, earlier=True)
        for trial in tuning.run():
            tick(trial.spent)
            say(trial_line(len(tuning.trials), trial))
            if out:
                save(out, {"task": task, **tuning.document()})
    say(outcome(tuning))
    if json:
        document({"task": task, **tuning.document()})


def outcome(tuning: SamplingSearch) -> str:
    """Return the best trial in one line."""
    if tuning.best is None:
        return "no settings could be tried on all examples; give a larger budget"
    return f"best: {trial_line(tuning.trials.index(tuning.best) + 1, tuning.best)}"


def trial_line(number: int, trial: Trial) -> str:
    """Return a trial in one line."""
    settings = trial.settings
    nucleus = f", top_p {settings.top_p:g}" if settings.top_p < 1 else ""
    return (
        f"{number}: temperature {settings.temperature:g}{nucleus}, n {settings.n}, "
        f"{settings.max_new_tokens} tokens: {trial.verdict}, score {trial.score:.3f}, "
        f"{trial.cost:.1f} tokens a question"
    )


def recall(path: Path | None, task: dict[str, Any]) -> list[Trial]:
    """Return the trials that a file holds, without those that the budget cut short.

    Raises:
        RequestError: it is no such file, or of another task.
    """
    from paceline.planning.sampling_search import Trial

    if path is None or not path.exists():
        return []
    try:
        kept = jsons.loads(path.read_text(encoding="utf-8"))
        before = kept["task"]
        trials = [Trial.read(values) for values in kept["trials"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise RequestError(f"{path} was not written by tune-sampling; name another file") from None
    other = [key for key in task if before.get(key) != task[key]]
    if other:
        raise RequestError(
            f"{path} belongs to another task: {other[0]} was {before.get(other[0])!r}, and is "
            f"{task[other[0]]!r}; name another file"
        )
    return [trial for trial in trials if trial.verdict != "unfinished"]
