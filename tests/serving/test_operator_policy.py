from pathlib import Path

import pytest

import paceline
from paceline import LM
from paceline.errors import MethodError, PacelineError, RequestError
from paceline.serving.operator_policy import (
    OperatorPolicy,
    open_guides,
    parse_guides,
    shown,
)
from paceline.serving.settings import ServerSettings
from paceline.watermarks.base import parse_watermark

EMBEDDED = Path(paceline.__file__).parent / "embedded"
GEDI = f"gedi:model={EMBEDDED},positive=happy,negative=sad"


@pytest.fixture
def lm():
    return LM(drafter="plain", budget=0)


def test_a_request_chooses_a_watermark_only_where_it_may():
    own, mark = "key=mine,kind=green", parse_watermark("key=server")
    closed, free = OperatorPolicy(mark), OperatorPolicy(mark, choice=True)
    assert closed.watermark_of(None) is free.watermark_of(None) is mark
    assert free.watermark_of(False) is None
    assert free.watermark_of(own) == parse_watermark(own)
    for wish in (False, own, ""):
        with pytest.raises(RequestError, match="this server chooses the watermark"):
            closed.watermark_of(wish)
    with pytest.raises(PacelineError, match="needs a key"):
        free.watermark_of("kind=green")


def test_guides_have_the_operators_names():
    guides = parse_guides(["calm=cfg:negative=Rage,scale=2", "deep=dola:layers=1+3"])
    steering = OperatorPolicy(guides=guides)
    assert steering.guides_of(["deep", "calm"]) == [guides["deep"], guides["calm"]]
    assert steering.guides_of([]) == []
    for name in ("cfg:scale=9", "proxy:/etc,/etc", "Calm", ""):
        with pytest.raises(RequestError, match="this server has calm, deep"):
            steering.guides_of([name])
    with pytest.raises(RequestError, match="has no guides"):
        OperatorPolicy().guides_of(["calm"])


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["cfg"], "expected NAME=GUIDE"),
        (["=cfg"], "expected NAME=GUIDE"),
        (["a b=cfg"], "expected NAME=GUIDE"),
        (["a=cfg", "a=dola"], "two guides are called a"),
        (["a=cgf"], "did you mean cfg"),
        (["a=cfg:scale=-1"], "0 to 100"),
        (["a=proxy:b"], "needs base"),
    ],
)
def test_what_is_no_guide_is_refused(texts, said):
    with pytest.raises(PacelineError, match=said):
        parse_guides(texts)


def test_models_of_guides_are_opened_before_any_request(lm):
    methods = parse_guides([f"kind={GEDI}", "deep=dola:layers=1+3", "off=cfg:negative=x"])
    open_guides(lm, methods)
    assert lm.guide_models.seconds > 0
    before, used = lm.guide_models.seconds, lm.engine.memory.used
    lm.request("Once", guide=methods["kind"], seed=1)
    assert lm.guide_models.seconds == before
    assert [engine.memory.used for engine in lm.guide_models.loaded] == [0]
    assert lm.engine.memory.used == used
    with pytest.raises(PacelineError, match="nowhere"):
        open_guides(lm, parse_guides(["bad=cleangen:nowhere"]))
    with pytest.raises(MethodError, match=r"the guide deep: .*exits from 0"):
        open_guides(lm, parse_guides(["deep=dola:layers=99"]))


SECRETS = ["key=s3cret", "key=s3cret,kind=green,delta=1", "kind=synthid,key=s3cret"]


@pytest.mark.parametrize("text", SECRETS)
def test_the_key_of_a_watermark_is_not_told(text):
    mark = parse_watermark(text)
    found = ServerSettings.read({}, {"PACELINE_SERVE_WATERMARK": text})
    assert "s3cret" not in f"{found!r} {found.shown()} {mark!r} {shown(mark)}"
    assert found.shown()["watermark"] == shown(mark)
    assert f"kind={mark.name}" in shown(mark)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s3cret", "has no value"),
        ("key=a,s3cret", "has no value"),
        ("key=s3cret,kind=gren", "did you mean green"),
        ("key=s3cret,length=1", "2 to 65536"),
        ("key=s3cret,key=s3cret", "given twice"),
    ],
)
def test_what_is_no_watermark_is_refused_without_its_key(text, said):
    with pytest.raises(PacelineError, match=said) as caught:
        ServerSettings(watermark=text)
    assert "s3cret" not in str(caught.value)


def test_guides_are_settings(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('guides = ["calm=cfg:negative=a;b,scale=2", "deep=dola"]')
    assert ServerSettings.read({}, {}, file).guides == (
        "calm=cfg:negative=a;b,scale=2",
        "deep=dola",
    )
    reported = ServerSettings.read({"guides": "calm=cfg:scale=2 ; deep=dola"}, {})
    assert reported.guides == ("calm=cfg:scale=2", "deep=dola")
    with pytest.raises(RequestError, match="expected NAME=GUIDE"):
        ServerSettings.read({"guides": "cfg"}, {})
