"""Exit policies: what they leave out, that drafts change nothing, and what is refused."""

import numpy as np
import pytest
import torch

from paceline import LM
from paceline.core import TokenTree
from paceline.engines.exiting import ExitingEngine
from paceline.errors import MethodError, RequestError
from paceline.exits.calm import Calm
from paceline.exits.ffn_skip import FfnSkip
from paceline.exits.skip_decode import SkipDecode
from paceline.models.gated_block import ExitPass
from tests.conftest import shared

SMALL = "stories260K"  # 5 layers
PROMPTS = ("Once upon a time", "The dog")
POLICIES = {
    "calm:threshold=0.5": (0.2, 0.999),
    "calm:threshold=0.9,measure=state": (0.2, 0.999),
    "ffn_skip:threshold=0.6,skip=1,first=0,last=0": (0.2, 0.999),
    "skip_decode:most=0.8,least=0.6,span=20": (0.5, 0.9),
}
NOTHING = (
    "calm:threshold=1",
    "ffn_skip:first=1",
    "ffn_skip:threshold=1",
    "skip_decode:least=1",
    "calm:threshold=0,first=5",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def opened(exits=None, **options):
    options = {"drafter": "plain", "budget": 0, "engine": "reference"} | options
    return LM(shared("models", SMALL), exits=exits, **options)


def texts(lm, **options):
    return [lm.generate(prompt, max_new_tokens=40, **options).tokens for prompt in PROMPTS]


@pytest.fixture(scope="module")
def plain():
    with opened() as lm:
        yield texts(lm, temperature=0)


@pytest.mark.parametrize("exits", NOTHING)
def test_a_policy_that_leaves_nothing_out_is_the_model_itself(plain, exits):
    with opened(exits) as lm:
        assert texts(lm, temperature=0) == plain
        assert lm.engine.nodes == lm.engine.attended == lm.engine.fed > 0


@pytest.mark.parametrize("exits", POLICIES)
def test_parts_of_layers_are_left_out_behind_the_prompt(plain, exits):
    low, high = POLICIES[exits]
    with opened(exits) as lm:
        engine = lm.engine
        assert isinstance(engine, ExitingEngine)
        prompt = lm.tokenizer.encode(PROMPTS[0])
        sequence = engine.start(np.array(prompt, np.int32), prompt=True)
        assert engine.nodes == engine.attended == engine.fed == 5 * len(prompt)
        assert engine.prompt_positions(sequence) == len(prompt)
        engine.extend(sequence, np.array(prompt, np.int32))
        assert engine.prompt_positions(sequence) == len(prompt)
        engine.release(sequence)
        engine.nodes = engine.attended = engine.fed = 0
        assert texts(lm, temperature=0) != plain
        assert low < engine.fed / engine.nodes < high
        assert (engine.attended == engine.nodes) == exits.startswith("ffn_skip")


@pytest.mark.parametrize("exits", POLICIES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("drafter", ["blend", "layer_skip:skip=3"])
def test_drafts_change_nothing(exits, temperature, drafter):
    options = {"temperature": temperature, "seed": 3}
    with opened(exits) as alone, opened(exits, drafter=drafter, budget=6) as drafting:
        assert texts(drafting, **options) == texts(alone, **options)


@pytest.mark.parametrize("exits", POLICIES)
def test_a_tree_gives_each_path_what_it_gets_alone(exits):
    """Decisions depend on a node's own path, not on its siblings."""
    tokens, parents = np.array([5, 9, 7, 30, 31], np.int32), np.array([-1, 0, 0, 2, 1], np.int32)
    tree = TokenTree(tokens, parents, np.ones(5, np.float32), np.zeros(5, np.int16))
    with opened(exits) as lm:
        engine = lm.engine
        sequence = engine.start(np.array([1, 20, 21, 22], np.int32), prompt=True)
        together = engine.forward([(sequence, tree)])
        for path in ([0, 1, 4], [0, 2, 3]):
            alone = engine.forward([(sequence, TokenTree.chain(tokens[path]))])
            np.testing.assert_allclose(alone, together[path], atol=1e-3)
        engine.release(sequence)


def nodes_of(layers, at, full=()):
    marks = torch.tensor([index in full for index in range(len(at))])
    return ExitPass(layers, torch.tensor(at), marks, lambda states: states)


def test_calm_leaves_for_good_where_the_two_largest_probabilities_are_far_apart():
    sure, unsure = torch.tensor([9.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])
    gate = Calm(threshold=0.9, first=2).gate(nodes_of(5, [3, 4, 5], full=[2]))
    for layer, states in enumerate(([sure] * 3, [unsure, sure, sure], [sure, unsure, sure])):
        state = torch.stack(states)
        assert gate.attention(layer).all() == (layer < 2)
        gate.note(layer, state, state, state)
    assert gate.attention(3).tolist() == gate.mlp(3).tolist() == [False, False, True]


def test_ffn_skip_counts_layers_and_measures_again():
    gate = FfnSkip(threshold=0.5, skip=2, first=0.2, last=0.2).gate(nodes_of(5, [3, 4, 5], [2]))
    turned, same = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[1.0, 0.1]] * 3)
    other = torch.tensor([[0.0, 1.0]] * 3)
    runs = []
    for layer in range(5):
        runs.append(gate.mlp(layer).tolist())
        after = same.clone()
        after[1] = other[1]
        gate.note(layer, turned, turned, after)
    assert runs == [[True] * 3, [True] * 3, [False, True, True], [False, True, True], [True] * 3]


def test_skip_decode_runs_first_and_last_layers_fewer_the_later():
    gate = SkipDecode(most=1, least=0.4, span=10, first=0.1).gate(nodes_of(10, [0, 5, 10, 99], [3]))
    ran = torch.stack([gate.attention(layer) for layer in range(10)]).T
    assert ran.sum(1).tolist() == [10, 7, 4, 10]
    assert ran[2].tolist() == [True] + [False] * 6 + [True] * 3
    assert (ran[2] <= ran[1]).all()


@pytest.mark.parametrize(
    ("exits", "error", "said"),
    [
        ("calm:threshold=2", MethodError, "calm:threshold is 2"),
        ("calm:measure=x", MethodError, "calm:measure is 'x', expected softmax or state"),
        ("ffn_skip:skip=0", MethodError, "ffn_skip:skip is 0"),
        ("skip_decode:most=0.5,least=0.6", MethodError, "skip_decode:least is 0.6"),
        ("clam", MethodError, "did you mean calm"),
        (3, RequestError, "exits is 3, expected a name or an ExitPolicy"),
    ],
)
def test_bad_settings_are_refused(exits, error, said):
    with pytest.raises(error, match=said):
        opened(exits)


def test_the_commands_take_a_policy():
    from typer.testing import CliRunner

    from paceline.cli.app import app

    command = ["generate", "--model", str(shared("models", SMALL)), "Once", "--max-new-tokens", "4"]
    exits = ["--exits", "skip_decode:least=0.5,span=4"]
    refused = CliRunner().invoke(app, [*command, *exits])
    assert refused.exit_code == 2
    assert "the exit policy skip_decode do not go together" in refused.output
    done = CliRunner().invoke(app, [*command, *exits, "--engine", "reference"])
    assert done.exit_code == 0, done.output
