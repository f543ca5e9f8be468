"""The Python API: a checkpoint, an engine and a drafter, ready to generate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import RLock
from time import perf_counter
from typing import TYPE_CHECKING, Any, NoReturn, Self, Unpack, overload

from paceline import registry
from paceline.arguments import check_integer, check_text, check_texts, check_tokens, wrong
from paceline.attention.base import Pattern
from paceline.compatibility import Side, check
from paceline.control.guides.guide_models import GuideModels
from paceline.core import Output, Request, Tokens
from paceline.decoding.governor import Fixed, Governor
from paceline.decoding.loop import Generation
from paceline.decoding.strategies.base import SearchOutput, Strategy, Task
from paceline.decoding.text_stream import text_of
from paceline.documents import chunk_cache
from paceline.documents.chunk import check_engine
from paceline.documents.chunk_folder import ChunkFolder
from paceline.drafters.base import DraftMethod, Target
from paceline.drafters.history.state_file import read_learnt, write_learnt
from paceline.engines.base import Engine
from paceline.engines.ensemble import EnsembleEngine
from paceline.engines.page_store import DEFAULT_LIMIT, PageStore, cache_identity
from paceline.engines.pipeline import PipelineEngine
from paceline.engines.pipeline.settings import Pipeline
from paceline.errors import MethodError, RequestError, unknown
from paceline.exits.base import ExitPolicy
from paceline.kvcache.base import Policy, parse_policy
from paceline.loading import open_budget, open_model
from paceline.models.vocabulary import Vocabulary
from paceline.prompt_filter import FilteredPrompt, kept_positions, open_filter
from paceline.request_builder import RequestBuilder, check_messages
from paceline.request_options import (
    Controls,
    Guides,
    Prompt,
    Prompts,
    RequestOptions,
    held_prompt,
    read_options,
    several_prompts,
)
from paceline.scoring import Score, score_tokens

if TYPE_CHECKING:
    from paceline.deprecated import Completion

__all__ = ["LM", "Completion", "Controls", "Guides", "Prompt", "RequestOptions", "Score"]


class LM:
    """A language model on this machine.

        with LM("path/to/checkpoint") as lm:
            print(lm.generate("Once upon a time", max_new_tokens=60))

    Args:
        model: a folder, a hub id such as `owner/name`, or None for the small embedded model.
            `A:weight=0.7+B:weight=0.3` are several models with the same tokenizer, decoded by the
            weighted mean of their distributions.
        dtype: format of the weights: `fp32`, `bf16`, `fp16`, `int8`, `int4` or `ternary`; `auto`
            keeps every matrix as the checkpoint stores it. `:head=FORMAT` after it sets that of
            embedding and head; `paceline.engines.formats.FORMATS` lists all. `auto:act=int8`
            rounds activations to 8 bits where a GGUF file has blocks, `auto:act=auto` where that
            costs this model little. `stored` is of the reference engine: each matrix stays in its
            stored form, in the file, and is expanded while its layer runs.
        engine: `native` (CPU), `reference` (torch), `static` (torch, with CUDA graphs), or `auto`:
            native unless a device is named.
        drafter: `NAME[:key=value,...]` or a `DraftMethod`; `blend` mixes several. What it learns
            is kept from request to request until `reset()`.
        budget: largest number of nodes of a draft tree beyond its root, or `auto`: as many as pay
            for themselves by this machine's measured cost, down to plain decoding.
        threads: number of threads of the native engine; None takes the cores that this process
            may use.
        device: device of the torch engines, e.g. `cuda`.
        kv_format: format of the native engine's cached keys and values: `fp32`, `fp16`, `int8`,
            `int4`, `int3`; `auto` is `fp32`. The last two are formats of the reference engine, too,
            which has `gear` besides.
        memory: bytes, or text such as `80MB`: of a nested checkpoint (recipe `bitstack`,
            `any_precision` or `llm_qfa`) only as many blocks are loaded as fit; `4bits` loads the
            codes of the latter two with so many bits. The engine is then one that holds the blocks
            as they are stored; the native one expands those that it has no kernel for.
        weights_memory: bytes, or text such as `600MB`: most of the weights that stay in memory, in
            the native engine. Layers beyond it stream from a file in the cache folder in every
            pass, which makes plain decoding as slow as the disk, and large draft trees nearly free;
            outputs do not change. None keeps all in memory.
        pipeline: number of nodes that the layers are divided among, this process included, or a
            `Pipeline`: passes go from node to node, and outputs do not change. With a number the
            others are processes on this machine. None: all layers are here.
        attention: `NAME[:key=value,...]` or a `Pattern`: positions that are read; lossy. None: all.
        exits: `NAME[:key=value,...]` or an `ExitPolicy`: which layers each token behind a prompt
            runs; lossy, and of the reference engine only. None runs all.
        rope: `yarn:factor=2`, `linear:`, `dynamic:` or `dual_chunk:...`: lets texts outgrow the
            trained context; see `paceline.models.extension.extend_context`.
        kv_policy: `NAME[:key=value,...]` or a `Policy`: bounds the cache of keys and values of
            every request that does not name its own; lossy. None keeps all rows. `score` reads
            whole texts, without it.
        prefix_cache_dir: folder that keeps the keys and values of prompts beyond the process: the
            longest beginning of a prompt that is stored is read instead of computed, to the bit;
            see `PageStore`. Native engine only. None stores nothing.
        prefix_cache_bytes: maximum bytes of that folder.
        chunk_cache_dir: folder that keeps the keys and values of documents beyond the process, see
            `documents` of `RequestOptions`; None keeps them in memory only.
        chunk_cache_bytes: maximum bytes of that folder.
        format: earlier name of `dtype`; deprecated.

    Several threads may use one model: they take turns, pass by pass, or list by list.

    Attributes:
        model: the checkpoint; the first one of several.
        tokenizer: its tokenizer.
        engine: runs the model.
        drafter: proposes tokens.
        drafter_method: the drafter's settings.
        draft_target: what the drafter knows of the model; builds further drafters.
        budget: sizes draft trees.
        request_builder: turns prompts and options into requests.
        pages: stores prefixes on disk; None without `prefix_cache_dir`.

    Raises:
        ModelError, MethodError, RequestError: what is wrong and what to do, in one sentence.
    """

    pages: PageStore | None = None

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: str = "auto",
        engine: str = "auto",
        drafter: str | DraftMethod = "blend",
        budget: int | str = "auto",
        threads: int | None = None,
        device: str | None = None,
        kv_format: str = "auto",
        memory: int | str | None = None,
        weights_memory: int | str | None = None,
        pipeline: int | Pipeline | None = None,
        attention: str | Pattern | None = None,
        exits: str | ExitPolicy | None = None,
        kv_policy: str | Policy | None = None,
        rope: str | None = None,
        prefix_cache_dir: str | Path | None = None,
        prefix_cache_bytes: int = DEFAULT_LIMIT,
        chunk_cache_dir: str | Path | None = None,
        chunk_cache_bytes: int = chunk_cache.DEFAULT_LIMIT,
        format: str | None = None,  # noqa: A002 (deprecated)
        **unexpected: NoReturn,
    ) -> None:
        start = perf_counter()
        if unexpected:
            known = [name for name in LM.__init__.__annotations__ if name not in _NO_ARGUMENTS]
            raise MethodError(unknown("argument of LM", next(iter(unexpected)), known))
        if format is not None:
            if dtype != "auto":
                raise MethodError("dtype and format are both given, and are one; leave format out")
            warnings.warn("LM(format=) is now LM(dtype=)", DeprecationWarning, stacklevel=2)
            dtype = format
        method = registry.drafters.parse(drafter) if isinstance(drafter, str) else drafter
        if not isinstance(method, DraftMethod):
            raise wrong("the drafter", drafter, "a name or a DraftMethod")
        self.drafter_method = method
        policy = parse_policy(kv_policy) if isinstance(kv_policy, str) else kv_policy
        if not isinstance(policy, Policy | None):
            raise wrong("the KV policy", kv_policy, "a name or a Policy")
        loaded = open_model(
            model,
            engine,
            threads=threads,
            device=device,
            weight_format=dtype,
            kv_format=kv_format,
            memory=memory,
            weights_memory=weights_memory,
            pipeline=pipeline,
            attention=attention,
            exits=exits,
            rope=rope,
        )
        self.model, self.engine = loaded.model, loaded.engine
        self.tokenizer = self.model.tokenizer
        vocab_size = self.engine.config.vocab_size
        one = None if isinstance(self.engine, EnsembleEngine) else self.model
        self.draft_target = Target(vocab_size, self.engine, self.tokenizer, loaded.trace, one)
        self.budget = open_budget(budget, self.engine)
        self.drafter = method.build(self.draft_target)
        if policy is not None:
            policy.check(self.engine)
        self.request_builder = RequestBuilder(
            self.model, self.tokenizer, self.engine, self.drafter, policy
        )
        self._name = self.model.name
        self._weight_format = dtype
        self._filters: dict[int | None, Engine] = {}  # of prompts: the last one, by its layer
        self._lock = RLock()  # engine and drafter serve one thread at a time
        if prefix_cache_dir is not None:
            self.store_prefixes(prefix_cache_dir, prefix_cache_bytes)
        if chunk_cache_dir is not None:
            self.store_chunks(chunk_cache_dir, chunk_cache_bytes)
        self._load_seconds = perf_counter() - start

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        strategy: str | Strategy | None = None,
        **options: Unpack[RequestOptions],
    ) -> Output: ...

    @overload
    def generate(
        self,
        prompt: Prompts,
        *,
        strategy: str | Strategy | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Output]: ...

    def generate(
        self,
        prompt: Prompt | Prompts,
        *,
        strategy: str | Strategy | None = None,
        **options: Unpack[RequestOptions],
    ) -> Output | list[Output]:
        """Return the output for a prompt, or a list of outputs for a list of prompts.

        A list is run in one batch. Each output is that of its prompt alone, token for token, if
        the drafter is exact.

        Args:
            prompt: text, token ids or chat messages; or a list of these.
            strategy: a search instead, see `search`; the best output is returned. Several prompts
                are searched one after the other.
            options: see `RequestOptions`.

        Raises:
            RequestError, MethodError: what was found, what is expected.
        """
        prompts = several_prompts(prompt)
        if strategy is not None:
            if prompts is None:
                return self.search(prompt, strategy, **options)[0]  # type: ignore[arg-type]
            return [self.search(each, strategy, **options)[0] for each in prompts]
        if prompts is None:
            return self.stream(prompt, **options).run()  # type: ignore[arg-type]
        read = read_options(options)
        return self._run_batch([self.request_builder.build_checked(p, *read) for p in prompts])

    def stream(self, prompt: Prompt | Request, **options: Unpack[RequestOptions]) -> Generation:
        """Start a generation; iterate over the result for its text, piece by piece.

        Args:
            prompt: text, token ids or chat messages; or a `Request`, then without options.
            options: see `RequestOptions`.

        Returns:
            an iterator of text, whose `output` is complete at its end, and which `run()` runs to
            that end.

        Raises:
            RequestError, MethodError: what was found, what is expected.
        """
        if not isinstance(prompt, Request):
            request = self.request(prompt, **options)
        elif options:
            raise RequestError("a Request has its options already; leave the others out")
        else:
            request = prompt
        text = text_of(request, self.tokenizer)
        generation = Generation(
            self.engine,
            self.drafter,
            request,
            self.budget,
            text,
            pages=self.pages,
            lock=self._lock,
        )
        generation.output.seconds.load = self._load_seconds + self.guide_models.seconds
        return generation

    def chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[RequestOptions]
    ) -> Output:
        """Return the answer to a conversation.

        Args:
            messages: each a dict with `role` and `content`, as the chat template expects them.
            options: see `RequestOptions`; with `tools` the calls are in `Output.tool_calls`.

        Raises:
            RequestError: the model has no chat template, the template refuses the messages, or as
                `generate`.
        """
        return self.stream(check_messages(messages), **options).run()

    def search(
        self, prompt: Prompt, strategy: str | Strategy, **options: Unpack[RequestOptions]
    ) -> list[SearchOutput]:
        """Return the outputs of a search, best first.

            lm.search("Once upon a time", "beam:width=8,returned=3")

        Args:
            prompt: text, token ids or chat messages.
            strategy: `NAME[:key=value,...]` or a `Strategy`. Those that draw nothing use none of
                the checkpoint's defaults that sample: temperature, top_k, top_p, min_p.
            options: see `RequestOptions`.

        Raises:
            RequestError, MethodError: the strategy cannot follow the request.
        """
        method = registry.strategies.parse(strategy) if isinstance(strategy, str) else strategy
        if not isinstance(method, Strategy):
            raise wrong("the strategy", strategy, "a name or a Strategy")
        if not method.draws:
            options = self.request_builder.without_sampling(options)
        values, samplers = read_options(options)
        held = held_prompt(prompt)

        def rebind(seed: int) -> Request:
            return self.request_builder.build_checked(held, {**values, "seed": seed}, samplers)

        request = rebind(values["seed"])
        task = Task(
            self.engine,
            request,
            lambda: text_of(request, self.tokenizer),
            rebind,
            self.drafter,
            lambda: self.drafter.fork() or self.drafter_method.build(self.draft_target),
            self.budget,
            self._known_texts,
        )
        with self._lock:
            outputs: list[SearchOutput] = method.run(task)
        for output in outputs:
            output.seconds.load = self._load_seconds
        return outputs

    def _known_texts(self) -> list[Tokens]:
        """Return the texts that `paceline warm` recorded for this model."""
        trace = self.draft_target.trace
        return [trace.tokens[text] for text in trace.texts()] if trace else []

    def request(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Request:
        """Return the `Request` that `generate` would run.

        Raises:
            RequestError, MethodError: what was found, what is expected.
        """
        return self.request_builder.build(prompt, **options)

    def _run_batch(self, requests: list[Request]) -> list[Output]:
        try:
            self.engine.memory  # noqa: B018 (raises where the engine cannot share it out)
        except MethodError:
            return [self.stream(request).run() for request in requests]
        from paceline.serving.offline import run_batch  # serving is needed for lists only

        with self._lock:
            outputs = run_batch(self, requests)
        for output in outputs:
            output.seconds.load = self._load_seconds
        return outputs

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the tokens that begin every text.

        Raises:
            RequestError: it is no text, or holds a lone surrogate.
        """
        return self.tokenizer.encode(check_text("the text", text))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens.

        Raises:
            RequestError: one is no integer or outside the vocabulary.
        """
        ids = check_tokens("the tokens", tokens, self.engine.config.vocab_size)
        return self.tokenizer.decode(ids)

    @overload
    def score(self, texts: str) -> Score: ...

    @overload
    def score(self, texts: list[str]) -> list[Score]: ...

    def score(self, texts: str | list[str]) -> Score | list[Score]:
        """Return the log-probability that the model gives to a text, or to each of several.

        Raises:
            RequestError: one is no text, or longer than the model's context.
            ModelError: the model's logits are not finite.
        """
        tokens = [self.encode(text) for text in check_texts("texts", texts)]
        with self._lock:
            scores = [score_tokens(self.engine, each) for each in tokens]
        return scores[0] if isinstance(texts, str) else scores

    def filter_prompt(
        self,
        prompt: Prompt,
        keep: int = 1024,
        *,
        layer: int | None = None,
        pool: int = 5,
        first: int = 1,
        last: int = 16,
    ) -> FilteredPrompt:
        """Return the part of a prompt that the model's first layers look at (GemFilter).

            kept = lm.filter_prompt(long_prompt, keep=512)
            print(kept.text)
            print(lm.generate(kept.tokens))

        The first layers read the whole prompt, and the products of its last token's queries with
        all keys choose. They are held in memory a second time, from the first call on. Lossy: the
        model then reads the kept tokens as if nothing had stood between them.

        Args:
            prompt: text, token ids or chat messages.
            keep: number of tokens.
            layer: the one that chooses, from 0 on; those before it run, too. None: at two fifths of
                the model.
            pool: neighbours over which products are averaged, odd.
            first: tokens at the beginning that are always kept.
            last: tokens at the end that are always kept.

        Raises:
            RequestError: a number is out of range, the prompt is empty or longer than the model
                sees, or the layer does not look at the whole prompt.
            MethodError: the model runs in another engine than native or reference, or is streamed.
        """
        tokens, _ = self.request_builder.encode(held_prompt(prompt))
        if not tokens:
            raise RequestError("the prompt is empty; give at least one token")
        with self._lock:
            if layer not in self._filters:
                engine = open_filter(self.model, self.engine, layer, self._weight_format)
                self._filters = {layer: engine}
            positions = kept_positions(
                self._filters[layer], tokens, keep, pool=pool, first=first, last=last
            )
        kept = tuple(tokens[position] for position in positions)
        text = self.tokenizer.decode(kept)
        return FilteredPrompt(kept, tuple(positions.tolist()), len(tokens), text)

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens and the text of each."""
        return self.request_builder.vocabulary

    @property
    def guide_models(self) -> GuideModels:
        """Models that guides run, opened on first use."""
        return self.request_builder.guide_models

    def reset(self) -> None:
        """Forget what the drafter and the governor have learnt, but not what passes take."""
        self.drafter.reset()
        if isinstance(self.budget, Governor):
            self.budget = self.budget.fresh()

    def store_prefixes(self, folder: str | Path, limit: int = DEFAULT_LIMIT) -> None:
        """Keep the keys and values of prompts in a folder; see `prefix_cache_dir`.

        Raises:
            CombinationError: the engine cannot hand out its keys and values, or the model has a
                KV policy.
            RequestError: the folder cannot be used, or the limit is too small.
        """
        if not isinstance(folder, str | Path):
            raise wrong("prefix_cache_dir", folder, "a folder")
        limit = check_integer("prefix_cache_bytes", limit, 1)
        policy = self.request_builder.kv_policy
        if policy is not None:
            one = f"the KV policy {policy.name}"
            check({Side.STORED_PREFIXES: "prefix_cache_dir", Side.KV_POLICY: one})
        self.pages = PageStore(self.engine, self.model.digest, folder, limit)

    def store_chunks(
        self,
        folder: str | Path | None,
        limit: int = chunk_cache.DEFAULT_LIMIT,
        memory: int = chunk_cache.DEFAULT_MEMORY,
    ) -> None:
        """Keep the keys and values of documents in a folder; see `chunk_cache_dir`.

        Args:
            folder: shared by any number of models and processes; None: memory only.
            limit: maximum bytes of the folder; the least recently used documents are removed.
            memory: maximum bytes in memory, likewise.

        Raises:
            MethodError: documents do not go with the engine or the model.
            RequestError: the folder cannot be used.
        """
        limit = check_integer("chunk_cache_bytes", limit, 1)
        memory = check_integer("the memory for documents", memory, 0)
        stored = None
        if folder is not None:
            if not isinstance(folder, str | Path):
                raise wrong("chunk_cache_dir", folder, "a folder")
            check_engine(self.engine)
            identity = cache_identity(self.engine, self.model.digest())
            stored = ChunkFolder(Path(folder), identity, limit)
        self.request_builder.chunks = chunk_cache.ChunkCache(memory, stored)

    def save_learnt(self, path: str | Path) -> None:
        """Write what the drafter has learnt to a safetensors file.

        Raises:
            ModelError: the file cannot be written.
        """
        write_learnt(Path(path), self.drafter.state())

    def load_learnt(self, path: str | Path) -> None:
        """Let the drafter continue from what `save_learnt` wrote.

        Raises:
            ModelError: the file cannot be read.
            MethodError: it is of another drafter, other settings or another vocabulary.
        """
        try:
            self.drafter.load(read_learnt(Path(path)))
        except MethodError as error:
            raise MethodError(f"{path}: {error}") from None

    def close(self) -> None:
        """Give up the model: the memory of its weights, cache, guides and drafters is freed.

        Later calls raise a RequestError. To close twice is harmless. A generation that is under
        way keeps what it needs until it is dropped.
        """
        if isinstance(engine := self.__dict__.get("engine"), PipelineEngine):
            engine.close()
        self.__dict__.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if "engine" not in self.__dict__:
            return "LM(closed)"
        engine = self.engine
        parts = [repr(self._name), f"dtype={engine.format!r}", f"engine={engine.name!r}"]
        if engine.threads is not None:
            parts.append(f"threads={engine.threads}")
        if engine.device is not None:
            parts.append(f"device={engine.device!r}")
        parts.append(f"drafter={self.drafter_method.name!r}")
        nodes = self.budget.nodes if isinstance(self.budget, Fixed) else "auto"
        return f"LM({', '.join(parts)}, budget={nodes!r})"

    if not TYPE_CHECKING:  # mypy shall still know which attributes there are

        def __getattr__(self, name: str) -> NoReturn:
            if not self.__dict__ and not name.startswith("__"):
                raise RequestError("this model is closed; open it again with LM(...)")
            raise AttributeError(f"LM has no attribute {name!r}")

    def complete(self, *arguments: Any, **options: Any) -> list[Completion]:
        """Return several continuations of a prompt; deprecated, see `deprecated.complete`."""
        from paceline.deprecated import complete

        return complete(self, *arguments, **options)


def __getattr__(name: str) -> object:
    if name == "Completion":  # imports strategies that other calls do not need
        from paceline.deprecated import Completion

        return Completion
    raise AttributeError(f"module 'paceline.lm' has no attribute {name!r}")


_NO_ARGUMENTS = ("format", "unexpected", "return")  # of LM, in a hint
