"""Every drafter with every engine, temperature and sampler: the output is plain decoding's."""

import numpy as np
import pytest

from paceline.control.base import bind
from paceline.control.lexical.hmm import blank, write_hmm
from paceline.control.temperature import Temperature
from paceline.core import Exactness, Request
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import Target
from paceline.drafters.history.corpus_index import write_corpus
from paceline.engines import open_engine
from paceline.models import load
from paceline.models.vocabulary import Vocabulary
from paceline.registry import controls, drafters, watermarks
from paceline.watermarks.base import parse_watermark
from tests.conftest import shared

# Settings that name files, as `files` makes them; every other drafter names its own examples.
WITH_FILES = {
    "datastore": ["datastore:path={folder}/corpus"],
    "model": ["model:path={model},format=fp32", "model:path={model},width=1,stop=bandit"],
}
DRAFTERS = {
    name: list(method.examples) or WITH_FILES[name]
    for name, method in drafters.methods().items()
    if method.__module__.startswith("paceline.")
    and method.exactness is Exactness.EXACT
    and not method.needs
}
VARIANTS = [spec for specs in DRAFTERS.values() for spec in specs]
SAMPLERS = {
    "greedy": (0.0, ""),
    "warm": (0.7, "top_p:p=0.9"),
    "hot": (1.0, "min_p:p=0.02"),
    "penalised": (1.0, "repetition_penalty:penalty=1.2"),
}
# Controls with settings that name files; every other control names its own examples.
CONTROLS_WITH_FILES = {
    "sounds": "sounds:most=2,dictionary={folder}/sounds",
    "monitor": "monitor:before={folder}/code",
    "keywords": "keywords:words=dog;a,hmm={folder}/hmm",
}
OWN_CONTROLS = {
    name: method
    for name, method in controls.methods().items()
    if method.__module__.startswith("paceline.")
}
CONTROLS = sorted(OWN_CONTROLS)
CROSSED = ["lookup", "recycle", "hostile", "suffix", "lookahead_trie", "blend"]
PROMPTS = [
    "Once upon a time, there was a little girl named Lily.",
    "One day, a dog and a cat went to the park. The dog said",
]


SPOKEN = (
    "once upon a time there was little girl boy dog named lily tim she he they it loved to play "
    "with her his and the in park one day saw big very happy said mom wanted go on outside sun"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the settings with files call `folder` and `model`."""
    folder = tmp_path_factory.mktemp("files")
    lines = (f"{word} W ER1 D" for word in SPOKEN.split())
    (folder / "sounds").write_text("\n".join(lines))
    (folder / "code").write_text("class Lily:\n    played = wanted = 1\n")
    path = shared("models", "stories260K")
    tokenizer, size = load(path).tokenizer, load(path).config.vocab_size
    write_hmm(folder / "hmm", blank(4, np.ones(size), 0), tokenizer)
    corpus = np.array([*tokenizer.encode(SPOKEN), -1], np.int32)
    write_corpus(folder / "corpus", corpus, tokenizer)
    return {"folder": folder, "model": path}


@pytest.fixture(scope="module")
def control_specs(files):
    """One specification of each control, by name."""
    specs = {name: method.examples[-1] for name, method in OWN_CONTROLS.items() if method.examples}
    specs |= {name: text.format(**files) for name, text in CONTROLS_WITH_FILES.items()}
    return specs


@pytest.fixture(scope="module", params=["native", "reference"])
def setting(request):
    """An engine, its prompts as tokens, and plain outputs that were already made."""
    model = load(shared("models", "stories260K"))
    if request.param == "reference":
        pytest.importorskip("torch").set_num_threads(1)  # so small a model only waits for a second
    engine = open_engine(model, request.param)
    engine.vocabulary = Vocabulary(
        engine.config.vocab_size, model.tokenizer, lambda: model.weights.dense("embed")
    )
    return engine, [tuple(model.tokenizer.encode(prompt)) for prompt in PROMPTS], {}


def build(name, setting, files):
    """Build a drafter of `VARIANTS`."""
    engine, tokenizer = setting[0], load(files["model"]).tokenizer
    target = Target(engine.config.vocab_size, engine, tokenizer)
    return drafters.parse(name.format(**files)).build(target)


def run(engine, drafter, prompt, sampler, seed, budget):
    temperature, text = SAMPLERS[sampler]
    request = Request(prompt, 40, temperature, seed)
    return controlled(engine, drafter, request, filter(None, [text]), budget)


def controlled(engine, drafter, request, texts, budget, watermark=None):
    methods = [controls.parse(text) for text in texts]
    if request.temperature:
        methods.append(Temperature(request.temperature))
    request = bind(methods, request, engine.vocabulary)
    request = parse_watermark(watermark).mark(request) if watermark else request
    return Generation(engine, drafter, request, Fixed(budget), margins=True).run()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_output_is_that_of_plain_decoding(setting, files, name, sampler):
    engine, prompts, plain = setting
    drafter = build(name, setting, files)
    for seed, prompt in enumerate(prompts if engine.invariant else prompts[:1]):
        key = (prompt, sampler)
        if key not in plain:
            plain[key] = run(engine, build("plain", setting, files), prompt, sampler, seed, 0)
            assert plain[key].passes == 40
        output = run(engine, drafter, prompt, sampler, seed, budget=12)
        assert_same(engine, output, plain[key])


def assert_same(engine, output, plain):
    if output.tokens == plain.tokens:
        return
    pairs = zip(output.tokens, plain.tokens, strict=False)
    first = next(i for i, (a, b) in enumerate(pairs) if a != b)
    margin = plain.margins[first]
    assert not engine.invariant, f"token {first} differs, margin {margin}"
    assert margin <= engine.tolerance


@pytest.fixture(scope="module")
def built(setting):
    """The drafters of `CROSSED`, which go on learning from test to test."""
    engine, prompts, _ = setting
    target = Target(engine.config.vocab_size, engine)
    crossed = {name: drafters.parse(name).build(target) for name in ("plain", *CROSSED)}
    request = Request(prompts[0], 24)
    for drafter in crossed.values():
        controlled(engine, drafter, request, (), 8)
    return crossed


@pytest.mark.parametrize("name", [name for name in CONTROLS if name != "temperature"])
def test_every_control_gives_plain_decodings_output_with_every_drafter(
    setting, built, control_specs, name
):
    engine, prompts, _ = setting
    text = control_specs[name]
    accepted = 0
    for temperature in (0.0, 1.0):
        request = Request(prompts[0], 14, temperature, 5, stop_tokens=frozenset({2, 13}))
        plain = controlled(engine, built["plain"], request, [text], 0)
        for drafter in CROSSED:
            output = controlled(engine, built[drafter], request, [text], 8)
            assert_same(engine, output, plain)
            accepted += sum(output.accepted.values())
    assert accepted, "no drafter was put to the test"


@pytest.mark.parametrize(
    "text", ["", "min_p:p=0.02", OWN_CONTROLS["grammar"].examples[0]], ids=["", "min_p", "grammar"]
)
@pytest.mark.parametrize("kind", watermarks.methods())
def test_every_watermark_gives_plain_decodings_output_with_every_drafter(
    setting, built, kind, text
):
    engine, prompts, _ = setting
    mark, accepted = f"key=secret,kind={kind}", 0
    for temperature in (0.0, 1.0) if kind == "green" else (1.0,):
        request = Request(prompts[0], 24, temperature, 5, stop_tokens=frozenset({2, 13}))
        texts = list(filter(None, [text]))
        unmarked = controlled(engine, built["plain"], request, texts, 0)
        plain = controlled(engine, built["plain"], request, texts, 0, mark)
        assert plain.tokens != unmarked.tokens or "grammar" in text  # which leaves few choices
        for drafter in CROSSED:
            output = controlled(engine, built[drafter], request, texts, 8, mark)
            assert_same(engine, output, plain)
            accepted += sum(output.accepted.values())
    assert accepted or "grammar" in text, "no drafter was put to the test"


@pytest.mark.parametrize("apart", [("last_token",), ("keywords", "sounds")])
def test_all_controls_at_once(setting, built, control_specs, apart):
    engine, prompts, _ = setting
    request = Request(prompts[0], 20, 1.0, 5, stop_tokens=frozenset({2}))
    texts = [
        control_specs[name]
        for name in CONTROLS
        if name not in ("temperature", "grammar", "first_token", *apart)
    ]
    plain = controlled(engine, built["plain"], request, texts, 0)
    for drafter in CROSSED:
        assert_same(engine, controlled(engine, built[drafter], request, texts, 8), plain)


def test_state_that_is_carried_changes_no_token(setting, files):
    engine, prompts, _ = setting
    for name in VARIANTS if engine.invariant else VARIANTS[::3]:
        drafter = build(name, setting, files)
        first = run(engine, drafter, prompts[0], "hot", 3, 12)
        other = build(name, setting, files)
        other.load(drafter.state())
        assert_same(engine, run(engine, other, prompts[0], "hot", 3, 12), first)
