"""Paceline as a model of EleutherAI's lm-evaluation-harness, with the scores of its model `hf`.

    python -m paceline.measuring.harness run --model paceline --model_args pretrained=FOLDER ...

takes the arguments of the command `lm_eval`, which has no way to find models of other packages.
In Python, importing this module registers the model for `lm_eval.simple_evaluate`. It needs the
package lm-eval: `pip install "paceline[harness]"`.

The tokens that are scored are those of `lm_eval.models.huggingface.HFLM`: the same special tokens,
the same split of context and continuation, the same truncation, the same rolling windows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray
from tqdm import tqdm

from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.base import Cached
from paceline.errors import RequestError
from paceline.lm import LM
from paceline.scoring import check_finite, token_logprobs

Scored = tuple[float, bool]
# A cache key, the tokens of the context and those of the continuation.
Pair = tuple[tuple[str, str] | None, list[int], list[int]]

# Settings of tasks by our names. Others are refused: what would change the text is not ignored.
_SAMPLERS = {
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "seed": "seed",
}
_LOG = logging.getLogger(__name__)


class PacelineLM(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A model of Paceline for lm-evaluation-harness.

    Args:
        pretrained: what `LM` takes: a folder, a GGUF file or a hub id; or an `LM`, whose settings
            stay as they are.
        dtype, engine, drafter, budget, threads, kv_format: as of `LM`. `fp32` gives the scores of
            `hf` with the same weights in float32.
        device: `cpu`, or a device of the reference engine.
        batch_size: how many texts `generate_until` writes at once; `auto` is 32. Scores are
            computed one text after the other, which changes nothing.
        max_length: most tokens that the model sees at once. Default: its context.
        max_gen_toks: tokens of an answer where the task gives no number.
        add_bos_token: whether texts begin with the token that begins a text. Default: as the
            tokenizer is set.
        prefix_token_id: token before a continuation without context, and before rolling windows.
            Default: the token that begins a text, else the one that ends it.
        enable_thinking: variable of the chat template.
        think_end_token: text that ends the reasoning; answers begin after it.
        max_batch_size: accepted as by `hf`; without effect, as no batch size is searched for.

    Raises:
        PacelineError: as `LM`, or the model has no token to begin with.
    """

    def __init__(
        self,
        pretrained: str | LM,
        dtype: str = "auto",
        engine: str = "auto",
        drafter: str = "blend",
        budget: int | str = "auto",
        threads: int | None = None,
        kv_format: str = "auto",
        device: str | None = None,
        batch_size: int | str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.lm = (
            pretrained
            if isinstance(pretrained, LM)
            else LM(
                pretrained,
                dtype=dtype,
                engine=engine,
                drafter=drafter,
                budget=budget,
                threads=threads,
                kv_format=kv_format,
                device=None if device == "cpu" and engine != "reference" else device,
            )
        )
        context = self.lm.engine.config.context
        self.max_length = context if max_length is None else max_length
        if not 1 < self.max_length <= context:
            raise RequestError(f"max_length is {max_length}, expected 2 to {context}")
        self.max_gen_toks = max_gen_toks
        self.batch_size = _batch_size(batch_size)
        self._name = pretrained if isinstance(pretrained, str) else pretrained.model.name
        self._add_bos = add_bos_token
        self._prefix = self._find_prefix(prefix_token_id)
        self._thinking, self._think_end = enable_thinking, think_end_token

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        token = self.lm.tokenizer.special_id("eos_token")
        return min(self.lm.model.defaults.stop_tokens) if token is None else token

    @property
    def prefix_token_id(self) -> int:
        """Token before a continuation that has no context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Name by which prepared requests are cached."""
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the text of the chat template; None where none is asked for.

        Raises:
            RequestError: the model has none, or it is asked for by a name.
        """
        if chat_template is False or chat_template is None:
            return None
        if isinstance(chat_template, str):
            raise RequestError(
                f"the chat template {chat_template!r} is asked for; give --apply_chat_template "
                "without a name"
            )
        template = self.lm.tokenizer.template
        if template is None:
            raise RequestError("this model has no chat template; leave --apply_chat_template out")
        return template.source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a conversation, up to where the answer begins.

        A system message that the template refuses is left out, with a warning, as by `hf`.
        """
        settings: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        if self._thinking is not None:
            settings["enable_thinking"] = self._thinking
        try:
            return self.lm.tokenizer.render_chat(chat_history, settings=settings)
        except RequestError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            _LOG.warning("the chat template takes no system message; it is left out")
            return self.lm.tokenizer.render_chat(rest, settings=settings)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the token ids of a text.

        Args:
            string: the text.
            add_special_tokens: whether tokens that begin a text are added. Default: as the
                tokenizer is set, unless the text begins with that token already.
            kwargs: none.
        """
        if kwargs:
            raise RequestError(f"tok_encode takes no {next(iter(kwargs))}")
        special = add_special_tokens
        if special is None:
            special = self._add_bos is not False and not string.startswith(self._text(self._prefix))
        return self._encode(string, special)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each whole text, in nats.

        Texts longer than the context are read in windows that do not overlap in what they predict.
        """
        totals = []
        for (string,) in tqdm([each.args for each in requests], disable=disable_tqdm):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self._prefix,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs: list[Pair] = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(score for score, _ in self._loglikelihood_tokens(pairs, True))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), total)
            totals.append(float(total))
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Scored]:
        """Return for each pair the log-likelihood of the continuation and whether it is greedy.

        Raises:
            RequestError: a continuation has no tokens, or more than the model sees.
            ModelError: the model's logits are not finite.
        """
        scores: list[Scored | None] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2])
        reader = _PrefixReader(self.lm)
        with tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm) as bar:
            try:
                for index in order:
                    key, context, continuation = requests[index]
                    score = scores[index] = self._score(reader, context, continuation)
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, score)
                    bar.update(1)
            finally:
                reader.close()
        return [score for score in scores if score is not None]

    def _score(self, reader: _PrefixReader, context: list[int], continuation: list[int]) -> Scored:
        count = len(continuation)
        if not context or not 0 < count <= self.max_length:
            raise RequestError(
                f"a continuation has {count} tokens after {len(context)}, expected 1 to "
                f"{self.max_length} after at least 1"
            )
        if len(context) + count > self.max_length + 1:
            _LOG.warning(
                "%d tokens are more than the model's %d: the context is cut on the left",
                len(context) + count,
                self.max_length,
            )
        ids = np.array([*context, *continuation][-(self.max_length + 1) :], np.int32)
        scores, greedy = reader.read(ids, count)
        return float(scores.sum()), greedy

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to a stop string.

        Raises:
            RequestError: a task asks for a setting that is not known here.
        """
        texts = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: repr(requests[i].args[1]))
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar:
            for _, indices in groupby(order, key=lambda i: repr(requests[i].args[1])):
                for batch in _chunks(list(indices), self.batch_size):
                    contexts = [requests[index].args[0] for index in batch]
                    given = requests[batch[0]].args[1]
                    for index, text in zip(batch, self._generate(contexts, given), strict=True):
                        texts[index] = text
                        key = (requests[index].args[0], given)
                        self.cache_hook.add_partial("generate_until", key, text)
                    bar.update(len(batch))
        return texts

    def _generate(self, contexts: Sequence[str], given: Mapping[str, Any]) -> list[str]:
        settings = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        stops = handle_stop_sequences(settings.pop("until"), self._text(self.eot_token_id))
        stops = [stop for stop in stops if stop]
        limit: int = settings.pop("max_gen_toks")
        room = self.max_length - limit
        if room <= 0:
            raise RequestError(
                f"max_gen_toks is {limit}, expected less than the {self.max_length} tokens that "
                "the model sees"
            )
        options = _sampling(settings)
        prompts = [self._encode_context(context)[-room:] for context in contexts]
        outputs = self.lm.generate(prompts, max_new_tokens=limit, stop=stops, **options)
        if any(output.finish not in ("stop", "length") for output in outputs):
            raise KeyboardInterrupt  # part of an answer is none
        # Decoded alone, as by `hf`: without the space that a tokenizer drops where a text begins.
        decoded = [self.lm.tokenizer.decode(output.tokens) for output in outputs]
        return [postprocess_generated_text(text, stops, self._think_end) for text in decoded]

    def _encode_context(self, context: str) -> list[int]:
        begin = self.lm.tokenizer.special.get("bos_token")
        begun = begin is not None and context.startswith(begin)
        return self._encode(context, not begun and self._add_bos is not False)

    def _encode(self, text: str, special: bool) -> list[int]:
        ids = self.lm.tokenizer.encode(text, special)
        begin = self.lm.tokenizer.special_id("bos_token")
        if special and self._add_bos and begin is not None and ids[:1] != [begin]:
            return [begin, *ids]
        return ids

    def _text(self, token: int) -> str:
        """Return a token as it stands in a text, special or not."""
        tokenizer = self.lm.tokenizer
        return tokenizer.token(token) if token in tokenizer.silent else tokenizer.decode([token])

    def _find_prefix(self, given: int | None) -> int:
        if given is not None:
            return int(given)
        begin = self.lm.tokenizer.special_id("bos_token")
        return self.eot_token_id if begin is None else begin


class _PrefixReader:
    """Scores texts one after the other; what a text shares with the one before is not read again.

    Args:
        lm: the model. Its engine is used by nothing else meanwhile.
    """

    def __init__(self, lm: LM) -> None:
        self._engine = lm.engine
        self._sequence: Cached = self._engine.open()
        self._ids = np.zeros(0, np.int32)

    def read(self, ids: Tokens, count: int) -> tuple[NDArray[np.float64], bool]:
        """Return the scores of the last tokens of a text.

        Args:
            ids: token ids, int32 [S].
            count: how many are scored, less than S.

        Returns:
            log-probabilities, float64 [count], and whether each token is the most probable one.
        """
        first = len(ids) - count  # the first token that is scored
        read = self._engine.prompt_positions(self._sequence)
        known = min(_common(self._ids, ids), first - 1, read)
        known = self._engine.cut_point(self._sequence, known)
        self._engine.truncate(self._sequence, known)
        self._engine.set_prompt(self._sequence, first - 1)
        self._ids = ids[:known]
        scores: list[NDArray[np.float64]] = []
        greedy = True

        def observe(offset: int, tree: TokenTree, logits: Floats) -> None:
            nonlocal greedy
            following = ids[first + offset : first + offset + len(tree)]
            scores.append(token_logprobs(logits, following))
            greedy = greedy and bool((logits.argmax(axis=1) == following).all())

        self._engine.extend(self._sequence, ids[known : first - 1])
        self._engine.extend(self._sequence, ids[first - 1 : -1], observe)
        self._ids = ids[:-1]
        joined = np.concatenate(scores)
        check_finite(joined.tolist())
        return joined, greedy

    def close(self) -> None:
        """Give the memory back."""
        self._engine.release(self._sequence)


def _common(a: Tokens, b: Tokens) -> int:
    """Return how many tokens two texts begin with alike."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


def _batch_size(given: int | str) -> int:
    text = str(given).partition(":")[0]
    if text == "auto":
        return 32
    if not text.isdecimal() or int(text) < 1:
        raise RequestError(f"batch_size is {given!r}, expected auto or a number from 1 on")
    return int(text)


def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `LM.generate` for what is left of a task's settings.

    Raises:
        RequestError: one is not known.
    """
    sampled = settings.pop("do_sample", False)
    options: dict[str, Any] = {"temperature": 0.0}
    if sampled:
        options["temperature"] = float(settings.pop("temperature", 1.0))
    settings.pop("temperature", None)
    for name, value in settings.items():
        if name not in _SAMPLERS:
            known = ", ".join(
                sorted({"until", "max_gen_toks", "do_sample", "temperature", *_SAMPLERS})
            )
            raise RequestError(f"a task sets {name}, expected {known}; leave it out")
        options[_SAMPLERS[name]] = value
    return options


def _chunks(items: Iterable[int], size: int) -> Iterator[list[int]]:
    listed = list(items)
    for begin in range(0, len(listed), size):
        yield listed[begin : begin + size]


def main() -> None:
    """Run the command `lm_eval`, which then knows the model `paceline`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


# By name: run as a program, this module would otherwise be two.
model_registry.register("paceline", target="paceline.measuring.harness:PacelineLM")

if __name__ == "__main__":
    main()
