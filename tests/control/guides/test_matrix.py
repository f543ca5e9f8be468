"""Every guide with every drafter and engine: the output is plain decoding's."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from paceline.control.guides.base import guided, parse_guide
from paceline.control.guides.guide_models import GuideModels
from paceline.control.temperature import Temperature
from paceline.core import Request, TokenTree
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import Target
from paceline.engines import open_engine
from paceline.errors import MethodError
from paceline.models import load
from paceline.registry import drafters, guides
from tests.conftest import shared

CROSSED = ["lookup", "recycle", "suffix", "trie", "model", "blend", "hostile"]
SPECS = {
    "proxy": "proxy:{0},{1}",
    "contrastive": "contrastive:{0}",
    "cleangen": "cleangen:{0},factor=1.1",
    "cfg": "cfg:negative=A sad dog,scale=2",
    "adaptive": "cfg:scale=2,stop=0.1",
    "dola": "dola:layers=1+3",
    "gedi": "gedi:{0}, happy, sad",
    "air": "air:{0}, happy, sad",
}
PROMPT = "One day, a dog and a cat went to the park. The dog said"


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Two perturbed copies of the target: the same tokens, slightly other thoughts."""
    source, found = shared("models", "stories260K"), []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp(f"copy{seed}")
        for path in source.glob("*.json"):
            (folder / path.name).write_bytes(path.read_bytes())
        random = np.random.default_rng(seed)
        weights = load_file(source / "model.safetensors")
        noisy = {
            name: (w + random.normal(0, 0.1 * w.std(), w.shape)).astype(w.dtype)
            for name, w in weights.items()
        }
        save_file(noisy, folder / "model.safetensors")
        found.append(folder)
    return found


@pytest.fixture(scope="module", params=["native", "reference"])
def setting(request, copies):
    """An engine, what is beside it, and drafters that go on learning from test to test."""
    if request.param == "reference":
        pytest.importorskip("torch").set_num_threads(1)  # so small a model only waits for a second
    model = load(shared("models", "stories260K"))
    engine = open_engine(model, request.param, threads=1 if request.param == "native" else None)
    target = Target(engine.config.vocab_size, engine, model.tokenizer)
    specs = {name: f"model:path={copies[1]}" if name == "model" else name for name in CROSSED}
    built = {name: drafters.parse(spec).build(target) for name, spec in specs.items()}
    plain = drafters.parse("plain").build(target)
    return engine, GuideModels(engine, model.tokenizer), plain, built


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", SPECS)
def test_every_guide_gives_plain_decodings_output_with_every_drafter(
    setting, copies, name, temperature
):
    engine, beside, nothing, built = setting
    heated = (Temperature(temperature),) if temperature else ()
    prompt = tuple(beside.tokenizer.encode(PROMPT))
    unguided = Request(prompt, 12 if engine.invariant else 7, temperature, 5, heated)
    request = guided(unguided, [parse_guide(SPECS[name].format(*copies))], beside)

    def run(asked, drafter, budget):
        return Generation(engine, drafter, asked, Fixed(budget), margins=True).run()

    plain, accepted = run(request, nothing, 0), 0
    for drafter in built.values():
        output = run(request, drafter, 6)
        assert_same(engine, output, plain)
        accepted += sum(output.accepted.values())
    assert accepted, "no drafter was put to the test"
    # A guide that did nothing would pass all of this.
    text = np.array([*prompt, *plain.tokens], np.int32)
    sequence = engine.start(text[: len(prompt) - 1])
    rows = engine.forward([(sequence, TokenTree.chain(text[len(prompt) - 1 :]))]).copy()
    engine.release(sequence)
    control, history = request.controls[0], text.tolist()
    texts = [history[: len(prompt) + place] for place in range(len(plain.tokens))]
    same = [
        np.array_equal(control.apply(*pair), pair[0]) for pair in zip(rows, texts, strict=False)
    ]
    control.release()
    assert not all(same)


def assert_same(engine, output, plain):
    if output.tokens == plain.tokens:
        return
    pairs = zip(output.tokens, plain.tokens, strict=True)
    first = next(i for i, (a, b) in enumerate(pairs) if a != b)
    margin = plain.margins[first]
    assert not engine.invariant, f"token {first} differs, margin {margin}"
    assert margin <= engine.tolerance


def test_every_guide_is_in_the_matrix():
    assert {spec.partition(":")[0] for spec in SPECS.values()} == set(guides.methods())


def test_a_code_stands_behind_the_token_that_begins_every_text(copies):
    model = load(copies[0])
    engine = open_engine(model, "native")
    beside = GuideModels(engine, model.tokenizer)
    prompt = model.tokenizer.encode("Once upon")
    assert prompt[0] == 1  # BOS
    code = model.tokenizer.encode(" happy", special=False)
    for text, expected in ((prompt, [1, *code, *prompt[1:]]), (prompt[1:], [*code, *prompt[1:]])):
        stream = beside.conditioned(str(copies[0]), " happy", Request(tuple(text), 4))
        assert stream._own(np.array(text, np.int32)).tolist() == expected


def test_checkpoints_are_opened_once_and_those_of_other_tokens_refused(copies):
    model = load(copies[0])
    beside = GuideModels(open_engine(model, "native", threads=1), model.tokenizer)
    request = Request((1, 5), 4)
    for spec in ("proxy:{0},{1}", "contrastive:{0}", "gedi:{1},a,b"):
        guided(request, [parse_guide(spec.format(*copies))], beside)
    assert len(beside._engines) == 2
    assert {engine.threads for engine in beside._engines.values()} == {1}
    assert beside.seconds > 0
    other = shared("models", "TinyStories-656K")
    with pytest.raises(MethodError, match="TinyStories-656K has other tokens than the model"):
        guided(request, [parse_guide(f"contrastive:{other}")], beside)


def test_dola_without_the_targets_sequence_is_the_same(setting):
    engine, beside, nothing, _ = setting
    prompt = tuple(beside.tokenizer.encode(PROMPT))
    request = guided(Request(prompt, 6), [parse_guide("dola:layers=0+2+4")], beside)
    looked = Generation(engine, nothing, request, Fixed(0), margins=True).run()

    class Blind:
        """Asks only `apply`, as beam search may."""

        def apply(self, logits, history):
            return request.controls[0].apply(logits, history)

    blind = replace(request, controls=(Blind(),))
    output = Generation(engine, nothing, blind, Fixed(0)).run()
    request.controls[0].release()
    assert_same(engine, output, looked)


def test_dola_has_all_exits_of_one_pass(setting, monkeypatch):
    engine, beside, nothing, _ = setting
    prompt = tuple(beside.tokenizer.encode(PROMPT))
    request = guided(Request(prompt, 6), [parse_guide("dola:layers=0+2+4")], beside)
    views, forward = [], engine.forward

    def counting(batch, rows="all", view=None):
        views.extend([view.layers.tolist()] if view else [])
        return forward(batch, rows, view)

    monkeypatch.setattr(engine, "forward", counting)
    output = Generation(engine, nothing, request, Fixed(0)).run()
    assert views == [[0, 1, 2, 3]] * output.passes


@pytest.mark.parametrize("name", SPECS)
def test_both_engines_guide_alike(copies, name):
    pytest.importorskip("torch").set_num_threads(1)
    model, found = load(shared("models", "stories260K")), []
    text = np.array(model.tokenizer.encode(PROMPT), np.int32)
    for kind in ("native", "reference"):
        engine = open_engine(model, kind)
        request = Request(tuple(text[:-2].tolist()), 4)
        beside = GuideModels(engine, model.tokenizer)
        control = guided(request, [parse_guide(SPECS[name].format(*copies))], beside).controls[0]
        sequence = engine.start(text[:-3])
        rows = engine.forward([(sequence, TokenTree.chain(text[-3:]))]).copy()
        history = text.tolist()
        found.append([control.apply(rows[i], history[: len(history) - 2 + i]) for i in range(3)])
    np.testing.assert_allclose(*found, rtol=0, atol=2e-3)


def test_gedi_scores_the_text_behind_bos_and_code(copies):
    """Anew from whole texts: BOS, the code, then all of the text but its BOS."""
    model = load(copies[0])
    engine = open_engine(model, "native")
    text = model.tokenizer.encode(PROMPT)
    sums, last = [], []
    for code in (" happy day", " sad"):
        own = [1, *model.tokenizer.encode(code, special=False), *text[1:]]
        sequence = engine.open()
        logits = engine.forward([(sequence, TokenTree.chain(own))]).astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        begin = len(own) - len(text)  # the row of the code's last token
        sums.append(sum(logs[begin + i, token] for i, token in enumerate(text[1:])))
        last.append(logs[-1])
    evidence = [np.exp((s + row) / len(text)) for s, row in zip(sums, last, strict=True)]
    row = engine.forward([(engine.start(np.array(text[:-1], np.int32)), TokenTree.root(text[-1]))])
    row = row[0].copy()
    expected = np.exp(row.astype(np.float64)) * (evidence[0] / sum(evidence)) ** 4
    spec = parse_guide(f"gedi:{copies[0]}, happy day, sad,omega=4,rho=1")
    request = guided(Request(tuple(text), 4), [spec], GuideModels(engine, model.tokenizer))
    found = np.exp(request.controls[0].apply(row, text))
    assert found / found.sum() == pytest.approx(expected / expected.sum(), rel=1e-3, abs=1e-6)
