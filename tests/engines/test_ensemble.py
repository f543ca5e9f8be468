import numpy as np
import pytest

from paceline import LM
from paceline.core import Request, TokenTree
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import Target
from paceline.engines.ensemble import EnsembleEngine, parse_ensemble
from paceline.engines.view import View
from paceline.errors import MethodError, ModelError, RequestError
from paceline.registry import drafters
from tests.conftest import shared
from tests.drafters.test_model import Near, request_at
from tests.toy import ToyEngine

SPECS = ("ensemble", "ensemble:member=1,stop=depth", "ensemble:member=0,width=1", "recycle")


def pair(*weights):
    return EnsembleEngine([ToyEngine(), Near()], weights or (0.7, 0.3))


def softmax(x):
    powers = np.exp(x.astype(np.float64) - x.max())
    return powers / powers.sum()


def test_the_logits_are_those_of_the_mean():
    engine = pair(7, 3)
    sequence = engine.start(np.array([1, 2], np.int32))
    logits = engine.forward([(sequence, TokenTree.chain([3, 4]))])
    for row, text in zip(logits, ([1, 2, 3], [1, 2, 3, 4]), strict=True):
        expected = sum(
            weight * softmax(member.logits_after(text))
            for weight, member in zip((0.7, 0.3), engine.members, strict=True)
        )
        assert softmax(row) == pytest.approx(expected, abs=1e-6)
    assert logits.dtype == np.float32


def test_sequences_follow_in_every_member():
    engine = pair()
    sequence = engine.start(np.array([1, 2, 3, 4], np.int32))
    fork = engine.fork(sequence)
    engine.truncate(sequence, 2)
    assert [part.length for part in sequence.parts] == [2, 2]
    assert fork.length == 4
    for each in (sequence, fork):
        engine.release(each)
    assert [member.opened for member in engine.members] == [0, 0]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_output_is_that_of_the_plain_ensemble(spec, temperature):
    engine = pair()
    target = Target(11, engine)
    plain, drafter = (drafters.parse(name).build(target) for name in ("plain", spec))
    for seed in range(3):
        request = request_at(temperature, seed, prompt=(1, 2, seed))
        outputs = [Generation(engine, d, request, Fixed(8)).run() for d in (plain, drafter)]
        assert outputs[0].tokens == outputs[1].tokens
        if spec != "recycle":
            assert outputs[1].tokens_per_pass > 1.3


def test_the_rejection_walk_knows_what_a_member_drew():
    engine = pair()
    drafter = drafters.parse("ensemble").build(Target(11, engine))
    request = Request((1, 2), 30, 1.0, walk="rejection")
    output = Generation(engine, drafter, request, Fixed(6)).run()
    assert sum(output.accepted.values()) > 0


@pytest.mark.parametrize("engine", ["native", "reference"])
def test_real_models_mix(engine):
    big, small = (shared("models", name) for name in ("bitstories-3M", "stories260K"))
    if engine == "reference":
        pytest.importorskip("torch").set_num_threads(1)
    lm = LM(f"{big}@0.8|{small}@0.2", engine=engine, drafter="ensemble:member=1", budget=8)
    for seed, temperature in enumerate((0.0, 1.0)):
        request = lm.request(
            "Once upon a time",
            max_new_tokens=24,
            temperature=temperature,
            seed=seed,
            ignore_eos=True,
        )
        plain = drafters.parse("plain").build(lm.draft_target)
        expected = Generation(lm.engine, plain, request, Fixed(0), margins=True).run()
        output = lm.stream(request).run()
        assert output.passes < 24
        differs = np.flatnonzero(np.array(output.tokens) != np.array(expected.tokens))
        if len(differs):
            assert not lm.engine.invariant
            assert expected.margins[differs[0]] <= lm.engine.tolerance


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(MethodError, match="two models or more"):
        EnsembleEngine([ToyEngine()], [1.0])
    with pytest.raises(ModelError, match=r"\[11, 12\] tokens"):
        EnsembleEngine([ToyEngine(), ToyEngine(12)], [1.0, 1.0])
    with pytest.raises(MethodError, match="expected above 0"):
        pair(1.0, -1.0)
    with pytest.raises(MethodError, match="needs an ensemble"):
        drafters.parse("ensemble").build(Target(11, ToyEngine()))
    for member in ("2", "-1", "all"):
        with pytest.raises(MethodError, match="0 to 1, or turns"):
            drafters.parse(f"ensemble:member={member}").build(Target(11, pair()))
    with pytest.raises(MethodError, match="the engine ensemble do not go together"):
        drafters.parse("layers").build(Target(11, pair()))
    engine = pair()
    with pytest.raises(RequestError, match="no views"):
        engine.forward([(engine.open(), TokenTree.root(1))], view=View())
    with pytest.raises(RequestError, match="another engine"):
        engine.truncate(ToyEngine().open(), 0)


def test_models_with_other_tokens_are_refused():
    names = "|".join(str(shared("models", n)) for n in ("bitstories-3M", "TinyStories-656K"))
    with pytest.raises(ModelError, match="bitstories-3M and TinyStories-656K have other tokens"):
        LM(names)


def test_the_language_of_ensembles():
    assert parse_ensemble("a@1") == [("a@1", 1.0)]
    assert parse_ensemble("a@0.7|b/c@3") == [("a", 0.7), ("b/c", 3.0)]
    with pytest.raises(ModelError, match="lacks a model"):
        parse_ensemble("a|")
    with pytest.raises(MethodError, match="no weight"):
        parse_ensemble("a@b|c")
