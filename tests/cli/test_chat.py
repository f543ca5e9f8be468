import pytest

from tests.conftest import shared
from tests.toy import Oracle, ToyEngine

TALK = ("chat", "--template", r"U: {user}\nB:", "--max-new-tokens", "5")


@pytest.fixture
def asked(toy, monkeypatch):
    """The prompts that were asked, as text."""
    toy.engine = ToyEngine(context=60)
    toy.drafter = Oracle(toy.engine)
    texts = []
    true_stream = toy.stream
    true_encode = toy.tokenizer.encode
    seen = {}

    def encode(text, **options):
        ids = true_encode(text)
        seen[tuple(ids)] = text
        return ids

    def stream(request):
        texts.append(seen[request.prompt])
        return true_stream(request)

    monkeypatch.setattr(toy.tokenizer, "encode", encode)
    monkeypatch.setattr(toy, "stream", stream)
    return texts


def test_each_turn_sees_the_earlier_ones(paceline, asked):
    done = paceline(*TALK, stdin="hello\n\nbye\n/exit\nnever\n")
    assert done.code == 0
    first, second = done.out.splitlines()
    tried, *rest = asked
    assert tried == "U: Hello\nB:"  # before anyone types
    assert rest == ["U: hello\nB:", f"U: hello\nB: {first}\nU: bye\nB:"]
    assert len(second) == 5
    assert done.err.count("tokens per pass") == 2


def test_json_holds_all_turns(paceline, asked):
    found = paceline(*TALK, "--json", stdin="hello\nbye\n").json
    assert [turn["user"] for turn in found["turns"]] == ["hello", "bye"]
    assert all(len(turn["text"]) == 5 for turn in found["turns"])


def test_the_oldest_turns_go_when_the_context_is_full(paceline, asked):
    done = paceline(*TALK, stdin="one two three four\nfive six seven eight\nnine\n")
    assert done.code == 0
    assert "the oldest turn was dropped to fit the context" in done.err
    assert "one" not in asked[-1]
    assert asked[-1].endswith("U: nine\nB:")


def test_an_interrupt_stops_the_answer_not_the_talk(paceline, asked, toy):
    class Impatient(Oracle):
        def propose(self, context, budget, min_path_prob=0.0):
            if not self.seen[1:]:
                raise KeyboardInterrupt
            return super().propose(context, budget, min_path_prob)

    toy.drafter = Impatient(toy.engine)
    done = paceline(*TALK, stdin="hello\nbye\n")
    assert done.code == 0
    assert "; interrupted" in done.err
    assert asked[-1].endswith("U: bye\nB:")


def test_without_a_template_the_refusal_says_what_to_do(paceline, toy):
    done = paceline("chat", stdin="hello\n")
    assert (done.code, done.out) == (2, "")
    assert "no chat template; or say how a turn is written, e.g. --template" in done.err
    done = paceline("chat", "--template", "User:", stdin="hello\n")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "expected {user} in it" in done.err


@pytest.mark.parametrize(
    ("walk", "said"), [("rejection", "the rejection walk and the drafter"), ("moon", "'moon'")]
)
def test_a_walk_that_cannot_be_is_refused_before_anyone_types(paceline, toy, walk, said):
    done = paceline(*TALK, "--temperature", 1, "--walk", walk, stdin="hello\n")
    assert done.code == 2
    assert said in done.err
    assert not done.out


def test_a_talk_may_take_the_rejection_walk(paceline):
    model = shared("models", "stories260K")
    words = ("--model", model, "--drafter", f"model:path={model}", "--budget", 4)
    done = paceline(
        *TALK, *words, "--temperature", 1, "--walk", "rejection", "--json", stdin="hello\nbye\n"
    )
    assert done.code == 0
    assert [turn["walk"] for turn in done.json["turns"]] == ["rejection"] * 2
