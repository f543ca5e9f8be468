"""lm-evaluation-harness: our model's scores and texts are those of its model `hf`."""

import sys
from pathlib import Path

import pytest

import paceline
from tests.conftest import shared
from tests.real_models import real_file
from tests.serving.api.conftest import served

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'paceline[harness]'"
)

from benchmarks.harness import difference, evaluate, hf_arguments, http_arguments, scores
from benchmarks.harness_tasks import TASKS, write_tasks
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from paceline import LM
from paceline.errors import RequestError
from paceline.measuring.harness import PacelineLM
from paceline.serving.api import create_app
from paceline.serving.service import Service
from paceline.serving.worker import Worker

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1200)]

EMBEDDED = Path(paceline.__file__).parent / "embedded"
WINDOW = 120  # tokens: shorter than some texts
CONTINUATIONS = (" there", "there", "\n", " a b c d e f g", "  two spaces")
TEXTS = (
    "Once upon a time",
    "  spaces before",
    "spaces behind  ",
    "Gr\u00fc\u00dfe, \u4f60\u597d! \U0001f600\n\n x\t",
    "a",
    "<|endoftext|> a special token",
    "<s>another",
    "<bos>a third",
    "<|im_start|>user\nHi<|im_end|>\n",
    "many words " * 70,
)
MODELS = (
    "embedded",
    "stories260K",
    pytest.param("smollm2-135m", marks=pytest.mark.real),
)


def requests(kind, arguments):
    return [Instance(kind, {}, each, 0, metadata=("task", 0, 1)) for each in arguments]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    if request.param == "embedded":
        return EMBEDDED
    if request.param == "stories260K":
        return shared("models", "stories260K")
    return real_file(request.param)


@pytest.fixture(scope="module")
def ours(model):
    return PacelineLM(str(model), dtype="fp32", max_length=WINDOW, threads=2)


@pytest.fixture(scope="module")
def theirs(model):
    return get_model("hf")(**hf_arguments(model, WINDOW))


def test_tokens_are_those_of_hf(ours, theirs):
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id
    for text in TEXTS:
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special)


def test_log_likelihoods_are_those_of_hf(ours, theirs):
    pairs = [(context, each) for context in ("", *TEXTS) for each in CONTINUATIONS]
    asked = requests("loglikelihood", pairs)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    assert len({score for score, _ in expected}) > len(pairs) / 2
    for pair, ours_of, theirs_of in zip(pairs, found, expected, strict=True):
        assert ours_of[0] == pytest.approx(theirs_of[0], abs=1e-3), pair
        assert ours_of[1] == theirs_of[1], pair


def test_rolling_log_likelihoods_are_those_of_hf(ours, theirs):
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    found = ours.loglikelihood_rolling(asked, disable_tqdm=True)
    # Sums over hundreds of tokens: float32 products in another order differ by 1e-5 at each.
    assert found == pytest.approx(expected, rel=5e-5, abs=1e-3)


def test_texts_are_those_of_hf(ours, theirs):
    asked = requests(
        "generate_until",
        [
            (text, {"until": until, "max_gen_toks": 20})
            for text in TEXTS
            for until in (["\n"], " t")
        ],
    )
    expected = theirs.generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(asked, disable_tqdm=True) == expected
    assert len(set(expected)) > 5


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    shared("data")
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        write_tasks(folder, shared("data").parent, 5, characters=900)
        yield folder


@pytest.fixture(scope="module")
def address(model):
    with LM(model, dtype="fp32", threads=2) as lm:
        service = Service(Worker(lm))
        service.start()
        with served(create_app(service, "model")) as found:
            yield found
        service.stop()


def test_tasks_have_the_scores_of_hf(model, tasks, address):
    names = list(TASKS)
    if model.suffix != ".gguf":
        names.remove("local_gsm8k")  # a tiny model's answers are noise
    expected = evaluate("hf", hf_arguments(model, WINDOW), tasks, names)
    arguments = {"pretrained": str(model), "dtype": "fp32", "max_length": WINDOW}
    found = {
        "paceline": evaluate("paceline", arguments, tasks, names),
        "http": evaluate("local-completions", http_arguments(address, WINDOW, model), tasks, names),
    }
    for kind, results in found.items():
        for name in names:
            got, right = scores(results, name), scores(expected, name)
            if name == "local_gsm8k":
                assert got == right, kind
            else:
                whole = name == "local_wikitext"  # sums over hundreds of tokens
                most = max(abs(score) for scores_of in right for score in scores_of)
                assert difference(got, right) < 1e-3 + 5e-5 * most * whole, (kind, name)
            theirs_of = expected["results"][name]
            metrics = [key for key, value in theirs_of.items() if isinstance(value, float)]
            assert metrics
            for key in metrics:
                value = results["results"][name][key]
                assert value == pytest.approx(theirs_of[key], rel=1e-3, abs=1e-3), (kind, name, key)


def test_what_would_be_a_wrong_number_is_refused(ours):
    with pytest.raises(RequestError, match="expected 1 to 120 after at least 1"):
        ours._loglikelihood_tokens([(None, [5], [])])
    with pytest.raises(RequestError, match="a continuation has 121 tokens"):
        ours._loglikelihood_tokens([(None, [5], [6] * 121)])
    for settings, message in (
        ({"num_beams": 4, "max_gen_toks": 5}, "sets num_beams"),
        ({"max_gen_toks": WINDOW}, "expected less than the 120 tokens"),
    ):
        with pytest.raises(RequestError, match=message):
            ours.generate_until(requests("generate_until", [("a", settings)]), disable_tqdm=True)
    with pytest.raises(RequestError, match="max_length is 1, expected 2 to"):
        PacelineLM(str(EMBEDDED), max_length=1)
    with pytest.raises(RequestError, match="batch_size is 'many'"):
        PacelineLM(str(EMBEDDED), batch_size="many")


def test_the_command_knows_the_model(tmp_path):
    import subprocess

    code = [sys.executable, "-m", "paceline.measuring.harness", "run"]
    words = ["--model", "paceline", "--model_args", f"pretrained={EMBEDDED}", "--tasks", "none"]
    done = subprocess.run([*code, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0  # for the task, not for the model
    assert "none" in done.stderr
    assert "'paceline'" not in done.stderr
