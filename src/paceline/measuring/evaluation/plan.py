"""What `paceline eval` does: reads the data first, then runs each model once over all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paceline.engines.ensemble import parse_ensemble
from paceline.errors import RequestError, unknown
from paceline.lm import LM
from paceline.measuring.evaluation.babilong import StoryContexts
from paceline.measuring.evaluation.base import Suite
from paceline.measuring.evaluation.blimp import Blimp
from paceline.measuring.evaluation.gsm8k import Gsm8k
from paceline.measuring.evaluation.lambada import Lambada
from paceline.measuring.evaluation.lm_harness import (
    PREFIX,
    TaskScores,
    check_harness,
    compare_tasks,
    run_task,
)
from paceline.measuring.evaluation.long_context import LongContexts
from paceline.measuring.evaluation.mbpp import Mbpp
from paceline.measuring.evaluation.run import (
    Evaluation,
    Tick,
    evaluate,
    suite_document,
)
from paceline.measuring.evaluation.squad import Squad
from paceline.measuring.evaluation.texts import TextDocuments, TextWindows, read_documents
from paceline.measuring.quality import WINDOW
from paceline.measuring.report.document import conditions
from paceline.models import Model, load
from paceline.models.tokenizer import same_tokens

Document = dict[str, Any]
Progress = Callable[[int, str], AbstractContextManager[Tick]]
SUITES = ("blimp", "lambada", "gsm8k", "mbpp", "long", "babilong", "squad")
_LONG = frozenset({"long", "babilong", "squad"})
_GENERATING = frozenset({"gsm8k", "mbpp"})
_SHOTS = {"gsm8k": 5, "mbpp": 3}
# Options of some suites only. Given without one of them, they are refused.
_TAKEN_BY = {
    "prefix": _LONG | {"blimp", "lambada"},
    "context": _LONG,
    "shots": _GENERATING,
    "chat": _GENERATING,
    "max_new_tokens": _GENERATING,
    "allow_code": frozenset({"mbpp", PREFIX}),
    "data": frozenset({*SUITES, PREFIX}),
}
_TOKENS = 400  # of an answer
_POLICY_ACTS = _LONG | _GENERATING  # suites that read and write as requests do


@dataclass(frozen=True)
class SuiteSettings:
    """What is evaluated.

    Attributes:
        text: text files.
        suite: names of suites, or `lm_eval:TASK`.
        data: folder of the suites' data.
        limit: only the first items.
        prefix: token before scored texts; None is `auto`.
        context: tokens of a long context; None is 2048, or what the model has room for.
        shots: solved examples; None takes each suite's own number.
        chat: problems are messages of the chat template.
        max_new_tokens: maximum tokens of an answer; None is 400.
        allow_code: whether programs of the model, and tasks of the user, may be run.
        seed: of examples and permutation tests.
    """

    text: Sequence[Path] = ()
    suite: Sequence[str] = ()
    data: Path | None = None
    limit: int | None = None
    prefix: str | None = None
    context: int | None = None
    shots: int | None = None
    chat: bool = False
    max_new_tokens: int | None = None
    allow_code: bool = False
    seed: int = 0

    def check(self) -> None:
        """Refuse settings that name nothing, or that no suite takes.

        Raises:
            RequestError: says which.
        """
        if not self.text and not self.suite:
            raise RequestError("nothing is to be evaluated; give --text FILE or --suite NAME")
        for name in self.suite:
            if not name.startswith(PREFIX) and name not in SUITES:
                raise RequestError(unknown("suite", name, (*SUITES, f"{PREFIX}TASK")))
        chosen = {PREFIX if name.startswith(PREFIX) else name for name in self.suite}
        for name, takers in _TAKEN_BY.items():
            if getattr(self, name) not in (None, False) and not chosen & takers:
                option = f"--{name.replace('_', '-')}"
                known = " or ".join(
                    sorted(f"{each}TASK" if each == PREFIX else each for each in takers)
                )
                raise RequestError(f"{option} is of --suite {known}, which is not given")
        if self.chat and self.shots:
            raise RequestError("--chat asks without examples; leave --shots or --chat out")
        if chosen & set(SUITES) and self.data is None:
            names = ", ".join(sorted(chosen & set(SUITES)))
            raise RequestError(f"--suite {names} needs its data; name their folder with --data")

    def check_policy(self) -> None:
        """Refuse a KV policy where something is scored that no policy acts on.

        Raises:
            RequestError: names it.
        """
        deaf = [*(["--text"] if self.text else []), *(set(self.suite) - _POLICY_ACTS)]
        if deaf:
            raise RequestError(
                f"a KV policy acts in --suite {', '.join(sorted(_POLICY_ACTS))}; leave "
                f"{min(deaf)} out, or --kv-policy"
            )

    def make(self, name: str) -> Suite:
        """Return a suite with its items.

        Raises:
            RequestError, MethodError: its data cannot be read, or it may not be run.
        """
        data, prefix = self.data or Path(), self.prefix or "auto"
        if name == "blimp":
            return Blimp(data, self.limit, prefix)
        if name == "lambada":
            return Lambada(data, self.limit, prefix)
        if name == "long":
            return LongContexts(data, self.limit, self.context, prefix, self.seed)
        if name == "babilong":
            return StoryContexts(data, self.limit, self.context, prefix, self.seed)
        if name == "squad":
            return Squad(data, self.limit, self.context, prefix, self.seed)
        tokens = self.max_new_tokens or _TOKENS
        shots = _SHOTS[name] if self.shots is None else self.shots
        if name == "gsm8k":
            return Gsm8k(data, self.limit, shots, self.seed, self.chat, tokens)
        return Mbpp(data, self.allow_code, self.limit, shots, self.chat, tokens)


@dataclass(frozen=True)
class ModelScores:
    """What one model achieved.

    Attributes:
        conditions: machine, model and engine.
        evaluations: of the suites, in order.
        tasks: of lm-evaluation-harness, by name.
    """

    conditions: Document
    evaluations: list[Evaluation]
    tasks: dict[str, TaskScores]


@dataclass(frozen=True)
class EvaluationPlan:
    """Suites with their items, ready to be run.

    Attributes:
        settings: what was asked for.
        suites: texts among them.
        tasks: of lm-evaluation-harness.
        model: as it was named.
        base: model to compare with, as it was named; None without one.
    """

    settings: SuiteSettings
    suites: list[Suite]
    tasks: list[str]
    model: str
    base: str | None

    @classmethod
    def make(cls, settings: SuiteSettings, model: str, base: str | None = None) -> EvaluationPlan:
        """Read the data of all suites; refuse here, before the long part, what cannot work.

        Raises:
            RequestError, MethodError, ModelError: what is wrong, in one sentence.
        """
        settings.check()
        names = list(dict.fromkeys(settings.suite))
        tasks = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
        if tasks:
            check_harness()
        suites = [settings.make(name) for name in names if not name.startswith(PREFIX)]
        texts = _texts(settings, model, base) if settings.text else []
        plan = cls(settings, [*texts, *suites], tasks, model, base)
        plan._tasks_folder()
        return plan

    @property
    def generates(self) -> bool:
        """Whether a suite lets the models write."""
        return bool(self.tasks) or any(suite.generates for suite in self.suites)

    def run(
        self,
        open_model: Callable[[], LM],
        open_base: Callable[[], LM] | None,
        progress: Progress,
        folder: Path | None = None,
        fresh: bool = False,
    ) -> Document:
        """Run the models, one after the other, and return the document of results.

        Args:
            open_model: opens the model.
            open_base: opens the base; None without one.
            progress: shows a bar over a number of items.
            folder: where results of items are kept; None keeps none.
            fresh: score items again of which there are results.

        Raises:
            RequestError, MethodError, ModelError: what is wrong, in one sentence.
        """
        ours = self._score(open_model, self.model, progress, folder, fresh)
        base = None
        if open_base is not None and self.base is not None:
            base = self._score(open_base, self.base, progress, folder, fresh)
        shown = {**asdict(self.settings), "data": self.settings.data and str(self.settings.data)}
        return {
            "schema": "paceline-eval/1",
            **ours.conditions,
            "base": base and {key: base.conditions[key] for key in ("model", "engine")},
            "settings": {**shown, "text": [str(path) for path in self.settings.text]},
            "suites": [*self._suites(ours, base), *self._tasks(ours, base)],
        }

    def _score(
        self,
        opened: Callable[[], LM],
        name: str,
        progress: Progress,
        folder: Path | None,
        fresh: bool,
    ) -> ModelScores:
        lm = opened()
        evaluations = []
        for suite in self.suites:
            with progress(len(suite.items), suite.name) as tick:
                evaluations.append(evaluate(suite, lm, folder, tick, fresh))
        limit, seed, own = self.settings.limit, self.settings.seed, self._tasks_folder()
        tasks = {task: run_task(lm, task, limit, seed, own) for task in self.tasks}
        return ModelScores(conditions(lm, name), evaluations, tasks)

    def _tasks_folder(self) -> Path | None:
        """Return the folder of the user's own tasks.

        Raises:
            RequestError: there is one, and its code may not be run.
        """
        if not self.tasks or self.settings.data is None:
            return None
        folder = self.settings.data / "lm_eval"
        if not folder.is_dir():
            return None
        if not self.settings.allow_code:
            raise RequestError(f"tasks in {folder} may run Python code; allow it with --allow-code")
        return folder

    def _suites(self, ours: ModelScores, base: ModelScores | None) -> list[Document]:
        documents = []
        for index, (suite, own) in enumerate(zip(self.suites, ours.evaluations, strict=True)):
            other = None if base is None else base.evaluations[index]
            documents.append(suite_document(suite, own, other, self.settings.seed))
        return documents

    def _tasks(self, ours: ModelScores, base: ModelScores | None) -> list[Document]:
        documents: list[Document] = []
        for task, own in ours.tasks.items():
            document: Document = {
                "suite": f"{PREFIX}{task}",
                "items": own.count,
                "earlier": 0,
                "settings": {},
                "metrics": {name: each._asdict() for name, each in own.metrics.items()},
            }
            if base is not None:
                other = base.tasks[task]
                metrics = {name: each._asdict() for name, each in other.metrics.items()}
                document["base"] = {"metrics": metrics}
                document["paired"] = {"metrics": compare_tasks(own, other, self.settings.seed)}
            documents.append(document)
        return documents


def _texts(settings: SuiteSettings, model: str, base: str | None) -> list[Suite]:
    """Return the texts in windows, or in documents where the models' tokenizers differ."""
    models = [_first(name) for name in (model, base) if name is not None]
    size = min(WINDOW, *(each.config.context for each in models))
    same = all(same_tokens(models[0].tokenizer, each.tokenizer) for each in models[1:])
    suites: list[Suite] = []
    for path in settings.text:
        twice = [other.name for other in settings.text].count(path.name) > 1
        name = str(path) if twice else path.name
        documents = read_documents(path)
        if same:
            tokenizer = models[0].tokenizer
            suites.append(TextWindows(name, documents, tokenizer, size, settings.limit))
        else:
            suites.append(TextDocuments(name, documents, settings.limit))
    return suites


def _first(name: str) -> Model:
    """Return a model; of an ensemble the first one, which has the tokenizer of all."""
    return load(parse_ensemble(name)[0][0])
