"""Options that several verbs share: single ones, and groups that a verb takes as one parameter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import parsing
from paceline.cli.files import read_text
from paceline.cli.parsing import one_budget as one_budget  # `serve` reads its budget with it
from paceline.errors import RequestError

if TYPE_CHECKING:
    from paceline.control.grammar import Grammar
    from paceline.engines.pipeline.settings import Pipeline
    from paceline.lm import LM, Prompt, RequestOptions
    from paceline.prompt_filter import FilteredPrompt
    from paceline.watermarks.base import Watermark as Mark

_DRAFTERS_HELP = (
    "Drafters with + between them, or repeat the option: 'recycle:k=8,keep=0.5+lookup' names two. "
    "'all' names every exact drafter that needs nothing else."
)

_MODEL_HELP = "A name of `paceline models`, a folder or GGUF file, or a hub id"

Model = Annotated[str, typer.Argument(help=f"{_MODEL_HELP}; or --model MODEL.")]
Models = Annotated[
    str,
    typer.Argument(help=f"{_MODEL_HELP}; 'A:weight=0.7+B:weight=0.3' is an ensemble."),
]
ModelOption = Annotated[
    str | None, typer.Option(help=f"{_MODEL_HELP}; the embedded story model by default.")
]
Drafter = Annotated[str, typer.Option(help="NAME[:key=value,...]; see `paceline methods`.")]
Drafters = Annotated[list[str], typer.Option(help=_DRAFTERS_HELP)]
Budget = Annotated[
    str,
    typer.Option(
        help="Maximum drafted tokens per pass; 0 is plain, auto sizes trees by measured cost."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, max=1024, help="Threads of the native engine; all usable cores by default."
    ),
]
Text = Annotated[str | None, typer.Argument(help="The text to continue; - reads it from stdin.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text, whatever the drafter.")]
PlainSeed = Annotated[int, typer.Option("--seed", min=0, help="The same seed, the same result.")]
Walk = Annotated[
    str,
    typer.Option(
        help="gumbel: the tokens of plain decoding; rejection: their "
        "distribution only, for draft models."
    ),
]
Watermark = Annotated[
    str | None,
    typer.Option(
        help="exponential|inverse|green|synthid:key=SECRET[,SETTING=VALUE]; see `paceline methods`."
    ),
]
TopP = Annotated[
    float | None, typer.Option(help="Keep the likeliest tokens that sum to this probability.")
]
TopK = Annotated[int | None, typer.Option(help="Keep this many of the likeliest tokens.")]
MinP = Annotated[
    float | None,
    typer.Option(help="Keep tokens with at least this share of the best one's probability."),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Divide the logits of tokens that occurred; 1 is none.")
]
Stop = Annotated[list[str] | None, typer.Option(help="Stop string (repeatable).")]
Chat = Annotated[bool, typer.Option("--chat", help="Use the checkpoint's chat template.")]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Load as many blocks of a nested checkpoint (recipe bitstack, any_precision or "
        "llm_qfa) as fit, e.g. 80MB; or codes of the latter two with so many bits, e.g. 4bits."
    ),
]
WeightsMemory = Annotated[
    str | None,
    typer.Option(
        help="Keep at most so many bytes of weights in memory, e.g. 600MB, and stream other layers "
        "from disk in each pass; exact, native engine."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]


@dataclass(frozen=True)
class EngineOptions:
    """Model."""

    engine: Annotated[str, typer.Option(help="auto, native, reference or static.")] = "auto"
    device: Annotated[str | None, typer.Option(help="Device of the torch engines, e.g. cuda.")] = (
        None
    )
    threads: Threads = None
    weight_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="Weight format: auto (as stored), fp32, bf16, fp16, int8, int4, ternary or one "
            "of docs/concepts/native-engine.md; ':head=FORMAT' sets that of embedding and head, "
            "'stored' (reference engine) expands each matrix only while its layer runs, "
            "'auto:act=int8' (or act=auto) rounds activations to 8 bits, where weights are GGUF "
            "blocks or integers.",
        ),
    ] = "auto"
    kv_format: Annotated[
        str,
        typer.Option(
            help="Format of cached keys and values: fp32, fp16, int8, int4, int3, gear; auto: fp32."
        ),
    ] = "auto"
    memory: Memory = None
    weights_memory: WeightsMemory = None
    attention: Annotated[
        str | None,
        typer.Option(
            help="Attention pattern, NAME:key=value,...; lossy. See `paceline methods`; those that "
            "are masks need --engine reference."
        ),
    ] = None
    exits: Annotated[
        str | None,
        typer.Option(
            help="Exit policy, NAME:key=value,...: which layers each token runs; lossy. See "
            "`paceline methods`; needs --engine reference."
        ),
    ] = None
    rope: Annotated[
        str | None,
        typer.Option(
            help="Extend the context: yarn:factor=2, linear:factor=2, dynamic:factor=2, or "
            "dual_chunk:factor=2 with --engine reference."
        ),
    ] = None
    kv_policy: Annotated[
        str | None,
        typer.Option(
            help="Policy that bounds the cache of keys and values, NAME:key=value,...; lossy. "
            "See `paceline methods`."
        ),
    ] = None

    def open(
        self,
        model: str | None,
        drafter: str = "plain",
        budget: int | str = 16,
        pipeline: Pipeline | None = None,
    ) -> LM:
        """Open a model in that engine, its layers on the nodes of a pipeline if there is one."""
        from paceline.lm import LM

        return LM(
            model,
            engine=self.engine,
            drafter=drafter,
            budget=budget,
            threads=self.threads,
            device=self.device,
            dtype=self.weight_format,
            kv_format=self.kv_format,
            memory=self.memory,
            weights_memory=self.weights_memory,
            pipeline=pipeline,
            attention=self.attention,
            exits=self.exits,
            rope=self.rope,
            kv_policy=self.kv_policy,
        )


@dataclass(frozen=True)
class PrefixCacheOptions:
    """Prefix cache."""

    prefix_cache_dir: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the keys and values of prompts for the next start."),
    ] = None
    prefix_cache_bytes: Annotated[
        str, typer.Option(help="Maximum size of that folder, e.g. 2GB.")
    ] = "4GB"

    def open(self, lm: LM) -> None:
        """Let a model keep its prompts in the folder, if one is named.

        Raises:
            PacelineError: the size or the folder cannot be used, or the engine has no pages.
        """
        size = _size("--prefix-cache-bytes", self.prefix_cache_bytes)
        if self.prefix_cache_dir is not None:
            lm.store_prefixes(self.prefix_cache_dir, size)


@dataclass(frozen=True)
class PromptFilterOptions:
    """Filter of long prompts."""

    prompt_keep: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Let the first layers choose so many tokens of the prompt, which the model then "
            "reads alone; lossy.",
        ),
    ] = None
    prompt_layer: Annotated[
        int | None,
        typer.Option(min=0, help="Layer that chooses them. Default: at two fifths of the model."),
    ] = None

    def filtered(self, lm: LM, prompt: Prompt) -> FilteredPrompt | None:
        """Return what is kept of a prompt; None: it is not filtered.

        Raises:
            PacelineError: a layer is named without a number of tokens, or the model or the prompt
                cannot be filtered.
        """
        if self.prompt_keep is None:
            if self.prompt_layer is not None:
                raise RequestError("--prompt-layer is that of --prompt-keep; give both")
            return None
        return lm.filter_prompt(prompt, self.prompt_keep, layer=self.prompt_layer)


@dataclass(frozen=True)
class DocumentOptions:
    """Documents."""

    document: Annotated[
        list[Path] | None,
        typer.Option(
            help="File with a document that stands before the prompt; may be given several times. "
            "Each is computed once, apart from the others; lossy."
        ),
    ] = None
    recompute: Annotated[
        float | None,
        typer.Option(
            help="Share of each document, 0 to 1, that is computed again behind the others."
        ),
    ] = None
    chunk_cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the keys and values of documents for the next start."),
    ] = None
    chunk_cache_bytes: Annotated[
        str, typer.Option(help="Maximum size of that folder, e.g. 2GB.")
    ] = "4GB"

    def request_options(self) -> RequestOptions:
        """Return the options of `LM.request`.

        Raises:
            RequestError: a file cannot be read.
        """
        texts = [read_text("the document", path) for path in self.document or ()]
        return {"documents": texts, "recompute": self.recompute}

    def open(self, lm: LM) -> None:
        """Let a model keep documents in the folder, if one is named.

        Raises:
            PacelineError: the size or the folder cannot be used, or documents do not go with the
                model.
        """
        size = _size("--chunk-cache-bytes", self.chunk_cache_bytes)
        if self.chunk_cache is not None:
            lm.store_chunks(self.chunk_cache, size)


@dataclass(frozen=True)
class DraftOptions:
    """Drafting."""

    drafter: Drafter = "blend"
    budget: Budget = "auto"

    @property
    def nodes(self) -> int | str:
        """Return the budget as a number, or `auto`.

        Raises:
            RequestError: it is neither a number of nodes nor `auto`.
        """
        return one_budget(self.budget)


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling."""

    max_new_tokens: NewTokens = 256
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; the checkpoint's default if not given.")
    ] = None
    seed: Seed = 0
    sampler: Annotated[
        str | None,
        typer.Option(
            help="NAME=VALUE,... e.g. 'min_p=0.05,temperature=0.8,dry=0.8,dry.allowed=3', or "
            "'min_p:p=0.05+dry:allowed=3'; "
            "see `paceline methods`."
        ),
    ] = None
    top_p: TopP = None
    top_k: TopK = None
    min_p: MinP = None
    repetition_penalty: RepetitionPenalty = None
    watermark: Watermark = None
    walk: Walk = "gumbel"
    stop: Stop = None

    @property
    def mark(self) -> Mark | None:
        """Return the watermark that `--watermark` names.

        Raises:
            PacelineError: as `one_watermark`.
        """
        return one_watermark(self.watermark)

    def request_options(self) -> RequestOptions:
        """Return the options of `LM.request`.

        Raises:
            PacelineError: a name is unknown, or a value cannot be.
        """
        controls, temperature = parsing.parse_sampler(self.sampler)
        named: RequestOptions = {
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        return {
            **parsing.beside_sampler(controls, named),
            "max_new_tokens": self.max_new_tokens,
            "temperature": parsing.one_temperature(self.temperature, temperature),
            "seed": self.seed,
            "controls": controls,
            "watermark": self.mark,
            "walk": self.walk,
            "stop": parsing.stops(self.stop),
        }


@dataclass(frozen=True)
class ConstraintOptions:
    """Constraints."""

    guide: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME:key=value,... another model or text that steers the output, e.g. "
            "'cfg:negative=A sad story,scale=1.5'; + between several, or repeatable; "
            "see `paceline methods`."
        ),
    ] = None
    json_schema: Annotated[
        Path | None, typer.Option(help="A file with a JSON schema that the output must follow.")
    ] = None
    regex: Annotated[
        str | None, typer.Option(help="A regular expression that the output must match.")
    ] = None
    grammar: Annotated[
        Path | None, typer.Option(help="A file with a Lark grammar that the output must follow.")
    ] = None
    choice: Annotated[
        str | None, typer.Option(help="The output is one of these: yes|no|maybe.")
    ] = None

    @property
    def guides(self) -> tuple[str, ...]:
        """Return the guides that `--guide` names."""
        return tuple(self.guide or ())

    def rules(self) -> Grammar | None:
        """Return the grammar that one of the four options gives.

        Raises:
            PacelineError: there are several, or it cannot be read.
        """
        from paceline.control.grammar import Grammar

        given = (self.json_schema, self.regex, self.grammar, self.choice)
        if sum(option is not None for option in given) > 1:
            raise RequestError(
                "give one of --json-schema, --regex, --grammar and --choice; an output follows one"
            )
        if self.json_schema is not None:
            return Grammar(read_text("the JSON schema", self.json_schema), "json")
        if self.regex is not None:
            return Grammar(self.regex)
        if self.grammar is not None:
            return Grammar(read_text("the grammar", self.grammar), "lark")
        return None if self.choice is None else Grammar.choice(self.choice.split("|"))

    def request_options(self) -> RequestOptions:
        """Return the options of `LM.request`.

        Raises:
            PacelineError: as `rules`.
        """
        return {"grammar": self.rules(), "guide": self.guides}


def _size(flag: str, text: str) -> int:
    """Return the number of bytes that an option gives.

    Raises:
        RequestError: it is no size.
    """
    from paceline.byte_sizes import Size

    try:
        return Size.parse(text)
    except ValueError as error:
        raise RequestError(f"{flag} is {text!r}: {error}") from None


def one_watermark(text: str | None) -> Mark | None:
    """Return the watermark that `--watermark` names.

    Raises:
        PacelineError: what is missing, unknown or out of range.
    """
    from paceline.watermarks.base import parse_watermark

    return None if text is None else parse_watermark(text)
