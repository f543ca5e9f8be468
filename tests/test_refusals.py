"""Each rule of `compatibility.RULES`, triggered from where users meet it."""

import asyncio
import json
from dataclasses import replace
from tempfile import NamedTemporaryFile
from types import SimpleNamespace

import numpy as np
import pytest

from paceline import LM
from paceline.compatibility import RULES
from paceline.core import Request
from paceline.decoding.strategies.base import Task
from paceline.decoding.strategies.beam import Beam
from paceline.engines.kv_formats import GroupedFormat
from paceline.engines.reference import ReferenceEngine
from paceline.errors import CombinationError
from paceline.kvcache.sliding_window import SlidingWindow
from paceline.models import load
from paceline.models.tensors import Dense, LowRank
from paceline.serving.api.choices import plan_choices
from paceline.serving.api.completions import completions
from paceline.serving.api.ollama_schemas import OllamaGenerateBody
from paceline.serving.api.parse import RequestLimits, completion_jobs
from paceline.serving.api.schemas import CompletionBody
from paceline.serving.prefill.settings import check_prefill
from tests.cli.conftest import Result
from tests.conftest import shared
from tests.decoding.strategies.test_beam import Guide
from tests.toy import ToyEngine

LIMITS = RequestLimits()
SMALL, OTHER = "stories260K", "TinyStories-656K"
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}


def lm(model=None, **options):
    return LM(model and shared("models", model), **{"budget": 4, **options})


def search(strategy, **options):
    engine = options.pop("engine", "auto")
    lm(engine=engine).search("Once", strategy, max_new_tokens=4, **options)


def apart(one, **options):
    with one:
        check_prefill(one.engine, **options)


def generate(drafter="plain", engine="auto", **options):
    lm(engine=engine, drafter=drafter).generate("Once", max_new_tokens=4, **options)


def bounded(drafter, opened=None, **options):
    one = lm(engine="reference", drafter=drafter, **(opened or {}))
    request = replace(one.request("Once", max_new_tokens=4, **options), kv_policy=SlidingWindow())
    one.generate(request)


def draft(model, settings, **options):
    lm(SMALL, drafter=f"model:path={shared('models', model)}{settings}", **options)


def rejecting(budget, drafter):
    one = lm(SMALL, drafter=drafter, budget=budget)
    one.generate("Once", max_new_tokens=4, walk="rejection", temperature=1)


def command(*words, prompts=None):
    from typer.testing import CliRunner

    from paceline.cli.app import app

    done = Result(CliRunner().invoke(app, list(map(str, words))))
    assert done.code == 2
    raise CombinationError(done.err)


def latents_in_groups():
    config = load(shared("models", SMALL)).config
    heads = config.layers[0].kv_heads * config.layers[0].head_dim
    right = Dense(np.ones((4, config.hidden_size), np.float32))
    factors = LowRank(Dense(np.ones((heads, 4), np.float32)), right)
    weights = {f"layers.0.{name}": factors for name in "kv"}
    engine = object.__new__(ReferenceEngine)
    engine.config, engine._grouped, engine.kv_format = config, GroupedFormat(), "gear"
    engine._take_latents(weights)


def filtered_tools():
    with NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([TOOL], file)
        file.flush()
        command("generate", "Once", "--prompt-keep", 64, "--tools", file.name)


def model_drafter():
    return f"model:path={shared('models', SMALL)}"


def two_drafts():
    several = f"{shared('models', OTHER)}|{shared('models', SMALL)}"
    lm(SMALL, drafter=f"model:path={several}")


TRIGGERS = {
    "kv-policy-position-drafter": lambda: bounded("sparse_kv"),
    "kv-policy-guide": lambda: bounded("plain", guide="cfg"),
    "kv-policy-pattern": lambda: bounded("plain", {"attention": "lm_infinite"}),
    "native-dual-chunk": lambda: lm(rope="dual_chunk:factor=2"),
    "native-low-rank-kv": lambda: lm(kv_format="gear:rank=2"),
    "static-dual-chunk": lambda: lm(engine="static", rope="dual_chunk:factor=2"),
    "pattern-dual-chunk": lambda: lm(
        engine="reference", attention="quest", rope="dual_chunk:factor=2"
    ),
    "grouped-kv-dual-chunk": lambda: lm(
        engine="reference", kv_format="int4", rope="dual_chunk:factor=2"
    ),
    "kv-policy-dual-chunk": lambda: bounded("plain", {"rope": "dual_chunk:factor=2"}),
    "kv-policy-search": lambda: Beam().run(
        Task(ToyEngine(), Request((1, 2), 9, kv_policy=SlidingWindow()))
    ),
    "documents-kv-policy": lambda: generate(documents=["Lily"], kv_policy="sliding_window"),
    "documents-grouped-kv": lambda: lm(SMALL, kv_format="int4").generate(
        "Once", documents=["Lily"]
    ),
    "documents-guide": lambda: generate(documents=["Lily"], guide="cfg"),
    "documents-pattern": lambda: lm(engine="reference", attention="lm_infinite").generate(
        "Once", documents=["Lily"]
    ),
    "documents-exits": lambda: lm(SMALL, engine="reference", exits="calm").generate(
        "Once", documents=["Lily"]
    ),
    "native-exits": lambda: lm(SMALL, exits="calm"),
    "static-exits": lambda: lm(SMALL, engine="static", exits="skip_decode"),
    "documents-filtered-prompt": lambda: command(
        "generate", "Once", "--prompt-keep", 64, "--document", __file__
    ),
    "tools-filtered-prompt": filtered_tools,
    "documents-search": lambda: search("beam", documents=["Lily"]),
    "documents-prompt-scores": lambda: completion_jobs(
        lm(), CompletionBody(prompt="Once", documents=["Lily"], prompt_logprobs=1), "a", "", LIMITS
    ),
    "documents-infill": lambda: generate(documents=["Lily"], suffix="end"),
    "temperature-drawless-search": lambda: search("beam", temperature=1),
    "noise-watermark-greedy": lambda: generate(watermark="exponential:key=a", temperature=0),
    "noise-watermark-rejection": lambda: generate(
        watermark="exponential:key=a", temperature=1, walk="rejection"
    ),
    "noise-watermark-drawless-search": lambda: Beam().run(
        Task(ToyEngine(), Request((1, 2), 9, noise=lambda *words: words))
    ),
    "one-text-control-drawless-search": lambda: search("beam", controls="mirostat=5"),
    "prediction-draftless-search": lambda: search("beam", prediction="a"),
    "draft-option-draftless-search": lambda: command(
        "generate", "Once", "--strategy", "beam", "--budget", 3
    ),
    "rejection-search": lambda: search("beam", walk="rejection"),
    "comparison-search": lambda: command("generate", "Once", "--strategy", "best_of", "--check"),
    "stored-prefixes-search": lambda: command(
        "generate", "Once", "--strategy", "beam", "--prefix-cache-dir", "x"
    ),
    "stored-prefixes-pattern": lambda: lm(attention="quest", prefix_cache_dir="x"),
    "stored-prefixes-kv-policy": lambda: lm(kv_policy="sliding_window", prefix_cache_dir="x"),
    "one-text-guide-search": lambda: Beam().run(
        Task(ToyEngine(), Request((1, 2), 9, controls=(Guide(),)))
    ),
    "growing-text-guide-revisiting-search": lambda: search("lattice", guide="cfg:stop=0.5"),
    "controls-shared-logits-search": lambda: search("superposed", controls="min_p=0.1"),
    "rejection-probability-free-drafter": lambda: rejecting(4, "lookup"),
    "rejection-adaptive-budget": lambda: rejecting("auto", model_drafter()),
    "rejection-comparison": lambda: command(
        "prove", "", "--prompts", __file__, "--walk", "rejection"
    ),
    "rejection-timing": lambda: command(
        "bench", shared("models", SMALL), "--prompts", __file__, "--limit", 1, "--regex", "a+",
        "--walk", "rejection", "--temperature", 1, "--drafters", model_drafter(), "--budget", 3,
    ),
    "lossy-drafter-comparison": lambda: command(
        "prove", "", "--prompts", __file__, "--drafters", "bild:path=x"
    ),
    "prediction-prediction-free-drafter": lambda: generate("lookup", prediction="a"),
    "compared-answers-greedy": lambda: search("best_of:n=2", temperature=0),
    "compared-answers-determining-watermark": lambda: search(
        "best_of:n=2", temperature=1, watermark="synthid:key=a"
    ),
    "compared-answers-stream": lambda: plan_choices(
        SimpleNamespace(
            n=1, best_of=2, stream=True, stream_options=None, strategy=None, use_beam_search=None,
            length_penalty=None, early_stopping=None,
        ),
        1,
        8,
    ),
    "prompt-scores-stream": lambda: asyncio.run(
        completions(
            CompletionBody(prompt="a", echo=True, logprobs=1, stream=True),
            None,
            SimpleNamespace(check_model=lambda name: None),
        )
    ),
    "system-prompt-raw-prompt": lambda: OllamaGenerateBody(
        model="m", prompt="a", system="b", raw=True
    ).as_completion(),
    "guide-other-guide": lambda: generate(guide="cfg+contrastive:x"),
    "tools-rules": lambda: generate(tools=[TOOL], grammar='start: word\nword: "a"'),
    "grammar-no-stop-token": lambda: generate(grammar='start: "a"', ignore_eos=True),
    "end-control-stop-strings": lambda: generate(keywords="dog", stop=["a"]),
    "frequent-head-other-tokens": lambda: draft(OTHER, ",head=100"),
    "parallel-drafting-other-tokens": lambda: draft(OTHER, ",schedule=pearl"),
    "several-drafts-other-tokens": two_drafts,
    "native-device": lambda: lm(engine="native", device="cpu"),
    "native-mask-pattern": lambda: lm(engine="native", attention="lm_infinite"),
    "reference-streamed-weights": lambda: lm(engine="reference", weights_memory="1MB"),
    "static-pipeline": lambda: lm(engine="static", pipeline=2),
    "pattern-pipeline": lambda: lm(attention="quest", pipeline=2),
    "exits-pipeline": lambda: lm(engine="reference", exits="calm", pipeline=2),
    "several-models-pipeline": lambda: LM("a:weight=1+b:weight=1", pipeline=2),
    "nested-memory-pipeline": lambda: lm(memory="1MB", pipeline=2),
    "prefill-apart-pipeline": lambda: apart(lm(pipeline=2)),
    "prefill-apart-pattern": lambda: apart(lm(attention="quest")),
    "prefill-apart-kv-policy": lambda: apart(lm(), kv_policy="tova"),
    "prefill-apart-nested-memory": lambda: apart(lm(), cut=True),
    "static-streamed-weights": lambda: lm(engine="static", weights_memory="1MB"),
    "reference-threads": lambda: lm(engine="reference", threads=2),
    "kv-policy-grouped-kv": lambda: lm(kv_format="int4").generate("a", kv_policy="tova"),
    "position-drafter-grouped-kv": lambda: lm(kv_format="int3", drafter="sparse_kv").generate("a"),
    "pattern-grouped-kv": lambda: lm(
        engine="reference", kv_format="int4", attention="lm_infinite"
    ),
    "latents-grouped-kv": latents_in_groups,
    "reference-kv-format": lambda: lm(engine="reference", kv_format="int8"),
    "static-threads": lambda: lm(engine="static", threads=2),
    "static-pattern": lambda: lm(engine="static", attention="lm_infinite"),
    "static-kv-format": lambda: lm(engine="static", kv_format="int8"),
}  # fmt: skip


def test_every_rule_has_a_trigger():
    assert set(TRIGGERS) == {rule.name for rule in RULES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_combination_is_refused_with_its_reason(rule):
    with pytest.raises(CombinationError) as caught:
        TRIGGERS[rule.name]()
    said = str(caught.value)
    assert "do not go together" in said
    assert rule.reason in said
    assert rule.advice in said
    assert said.rstrip("\n").count("\n") == 0
