import pytest

from paceline import LM
from paceline.control.guides.cfg import Cfg
from paceline.errors import MethodError
from tests.conftest import shared


def test_generate_guides_checks_and_charges(paceline):
    words = ("generate", "Once upon a time", "--max-new-tokens", 12, "--budget", 4, "--check")
    done = paceline(*words, "--guide", "cfg:negative=A dog,scale=4", "--json")
    assert done.code == 0
    assert done.json["check"]["identical"] is True
    assert done.json["seconds"]["guide"] > 0
    assert "% guiding" in done.err
    assert done.json["tokens"] != paceline(*words, "--json").json["tokens"]


def test_chat_prove_and_bench_guide_too(paceline, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("Once upon a time\nOne day, a dog")
    amateur = shared("models", "stories260K")
    few = ("--prompts", path, "--max-new-tokens", 6, "--drafters", "recycle", "--limit", 1)
    guide = ("--guide", f"contrastive:{amateur}", "--guide", "air:" + f"{amateur}, happy, sad")
    model = shared("models", "bitstories-1M")
    done = paceline("prove", model, *few, *guide, "--temperatures", "0,1", "--json")
    assert (done.code, done.json["identical"], done.json["pairs"]) == (0, 2, 2)
    assert done.json["settings"]["guide"] == list(guide[1::2])
    budget = ("--budget", 4, "--repeat", 1)
    found = paceline("bench", model, *few, *guide, *budget, "--json").json
    assert all(arm["pass_seconds"]["guide"] > 0 for arm in found["arms"])
    assert found["settings"]["guide"] == list(guide[1::2])
    chat = ("chat", "--model", model, "--template", "{user}", "--max-new-tokens", 4, *guide)
    turns = paceline(*chat, "--json", stdin="Hello\n").json["turns"]
    assert turns[0]["seconds"]["guide"] > 0


def test_what_cannot_be_guided_exits_with_2(paceline):
    done = paceline("generate", "Once", "--guide", "praxy:a,b")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "proxy" in done.err


def test_python_takes_texts_methods_and_several():
    lm = LM(drafter="recycle", budget=4, engine="native")
    ask = {"prompt": "Once upon a time", "max_new_tokens": 10, "temperature": 0}
    by_text = lm.generate(**ask, guide="cfg:negative=A dog,scale=4")
    assert lm.generate(**ask, guide=Cfg(negative="A dog", scale=4)).tokens == by_text.tokens
    both = lm.generate(**ask, guide=["cfg:negative=A dog,scale=4"])
    assert both.tokens == by_text.tokens
    with pytest.raises(
        MethodError, match="the guide dola and the guide cfg do not go together: no order"
    ):
        lm.request("Once", guide=["dola", Cfg()])
