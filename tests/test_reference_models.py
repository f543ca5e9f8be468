"""The reference models' pipeline at a tiny size: tokenizer, packing, training, export, card."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from benchmarks.embedded_model.model import Llama
from benchmarks.reference_models import evaluate, sources, train, vocabulary
from benchmarks.reference_models.contamination import phrases, search
from benchmarks.reference_models.export import END, END_OF_TEXT, export, shards
from benchmarks.reference_models.family import FAMILY, Member, parameters
from benchmarks.reference_models.int8 import convert
from benchmarks.reference_models.pack import encode, pack
from benchmarks.reference_models.windows import Blocks, Dense, Windows, documents
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from paceline import LM
from paceline.models.tokenizer import open_tokenizer

TINY = replace(
    FAMILY["5m"].shape,
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)
WORDS = ["the", "old", "king", "saw", "a", "ship", "and", "two", "birds", "over", "grey", "sea"]
CODE = "def f(x):\n    if x:\n        return 10 + x\n\n\nclass A:\n    pass\n"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other at every tiny matrix do not bear a neighbour."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def text(number: int) -> str:
    draw = np.random.default_rng(number)
    return " ".join(draw.choice(WORDS, 60 + number % 50)) + f". {number}\n"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like ../shared, with few and short documents."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "text").mkdir()
    for place, name in enumerate(sources.TEXTS):
        with lzma.open(folder / "text" / f"{name}.jsonl.xz", "wt", encoding="utf-8") as file:
            for number in range(30):
                said = CODE * 3 if name == "python-stdlib" else ""
                file.write(json.dumps({"text": said + text(100 * place + number)}) + "\n")
    (folder / "data/gsm8k").mkdir(parents=True)
    (folder / "data/mbpp").mkdir()
    problem = {"question": "How many? ", "answer": "It is 2+2=<<2+2=4>>4.\n#### 4"}
    rows = "\n".join(json.dumps(problem | {"question": f"How many {i}?"}) for i in range(9))
    (folder / "data/gsm8k/train.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    task = {"code": "def f(x):\r\n\treturn x", "test_list": ["assert f(1) == 1"]}
    rows = "\n".join(
        json.dumps(task | {"task_id": i, "text": f"Add {i}."}) for i in (1, 11, 510, 511, 601)
    )
    (folder / "data/mbpp/mbpp.jsonl").write_text(rows)
    return folder


@pytest.fixture(scope="module")
def tokenizer(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = (each for name in sources.TEXTS for each in sources.read(name, shared)[0])
    vocabulary.save(vocabulary.train(texts, TINY.vocab_size), folder)
    return folder


@pytest.fixture(scope="module")
def work(shared: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    pack(shared, folder, tokenizer, processes=2)
    return folder


def test_the_family_has_the_sizes_it_is_called_by():
    for name, member in FAMILY.items():
        assert parameters(member.shape) / 1e6 == pytest.approx(float(name[:-1]), rel=0.03)
        assert member.windows % member.part == 0


def test_validation_is_by_document_and_the_same_in_any_order():
    texts = [text(number) for number in range(400)]
    kept, held = sources.split(texts)
    assert sorted(kept + held) == sorted(texts)
    assert sources.split(texts[::-1])[1] == held[::-1]
    size = sum(len(each.encode()) for each in held)
    assert 0.005 <= size / sum(len(each.encode()) for each in texts) < 0.01


def test_chats_leave_out_test_tasks_and_calculator_notes(shared: Path):
    tasks = list(sources.mbpp(shared))
    assert len(tasks) == 3
    assert "\n    return x" in tasks[0]
    assert "It is 2+2=4.\n#### 4" in next(sources.gsm8k(shared))


@settings(max_examples=30, deadline=None)
@given(said=st.text(st.characters(exclude_categories=["Cs"])) | st.just("<|end|> <|user|>"))
def test_any_text_survives_the_tokenizer(said: str):
    backend = _committed()
    backend.encode_special_tokens = True
    ids = backend.encode(said).ids
    assert ids[0] == END_OF_TEXT
    assert min(ids[1:], default=8) >= 8  # no special tokens but the first
    assert backend.decode(ids[1:]) == said


def _committed() -> Tokenizer:
    return Tokenizer.from_file(str(sources.TOKENIZER / "tokenizer.json"))


def test_the_tokenizer_keeps_digits_apart_and_indentation_together():
    backend = _committed()
    assert backend.get_vocab_size() == 8192
    pieces = backend.encode("x = 2048\n        return", add_special_tokens=False).tokens
    assert pieces == ["x", "Ġ=", "Ġ", "2", "0", "4", "8", "Ċ", "Ġ" * 7, "Ġreturn"]


def test_training_the_tokenizer_twice_gives_the_same(shared: Path, tokenizer: Path, tmp_path: Path):
    texts = (each for name in sources.TEXTS for each in sources.read(name, shared)[0])
    vocabulary.save(vocabulary.train(texts, TINY.vocab_size), tmp_path)
    for path in tokenizer.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_chats_are_packed_as_paceline_will_ask():
    backend, ours = _committed(), open_tokenizer(sources.TOKENIZER)
    asked = ours.encode_chat([{"role": "user", "content": " What is 2 + 2? "}])
    packed = encode(backend, sources.conversation(" What is 2 + 2? ", "4"), chat=True)
    assert packed[: len(asked)].tolist() == asked
    assert packed.tolist()[-1] == END
    plain = encode(backend, "so <|end|> it is", chat=False)
    assert END not in plain
    assert ours.encode("It")[0] == END_OF_TEXT


def test_packing_is_the_same_with_any_number_of_processes(
    shared: Path, tokenizer: Path, work: Path, tmp_path: Path
):
    pack(shared, tmp_path, tokenizer, processes=1)
    for path in sorted(work.iterdir()):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    facts = json.loads((work / "pack.json").read_text())
    for name, parts in facts.items():
        for part, held in parts.items():
            stream = np.load(work / f"{name}.{part}.npy")
            assert stream.dtype == np.uint16
            assert len(stream) == held["tokens"]
            assert (stream == END_OF_TEXT).sum() == held["documents"] > 0


def test_contamination_is_found():
    item = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    index = phrases({"long": [item], "short": ["Red, green and blue are colours of a flag."]})
    assert search(f"He said: {item.upper()}!", index).keys() == {"long"}
    assert search("two three " + item[4:].replace("thirteen", "13"), index) == {}
    assert search("red green and blue are colours of a flag", index).keys() == {"short"}
    assert search("red green and blue are colours of a", index) == {}


def test_every_window_of_a_pass_is_read_once():
    windows = Windows(np.arange(1001, dtype=np.uint16), length=10, count=7)
    steps = [windows[step] for step in range(-(-windows.each // 7))]
    starts = torch.cat(steps)[: windows.each, 0].tolist()
    assert len(set(starts)) == windows.each == 99
    assert len({start % 10 for start in starts}) == 1
    assert torch.equal(windows[3], Windows(np.arange(1001, dtype=np.uint16), 10, 7)[3])
    assert torch.equal(windows[3][:, 1:], windows[3][:, :-1] + 1)


def _documents_in_windows() -> torch.Tensor:
    tokens = torch.randint(1, TINY.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    tokens[0, [0, 50]] = END_OF_TEXT
    tokens[1, [7, 8, 120]] = END_OF_TEXT
    return tokens


def test_documents_do_not_see_each_other():
    model, tokens = _lively(), _documents_in_windows()
    together = model.states(tokens, Dense()(tokens))
    alone = model.states(tokens[:1, 50:])
    torch.testing.assert_close(together[:1, 50:], alone, atol=1e-4, rtol=1e-4)
    assert documents(tokens)[1, [6, 7, 8, 119, 120]].tolist() == [0, 1, 2, 2, 3]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()  # flex attention has no backward pass on a CPU; check.py compares it on a GPU
def test_blocks_and_dense_masks_agree():
    tokens, model = _documents_in_windows(), _lively()
    dense, blocks = (model.states(tokens, m(tokens)) for m in (Dense(), Blocks(2, 128, "cpu")))
    torch.testing.assert_close(dense, blocks, atol=1e-3, rtol=1e-3)
    assert (dense - model.states(tokens)).abs().max() > 0.1


def _lively() -> Llama:
    """A model whose layers do something, unlike a fresh one's."""
    torch.manual_seed(1)
    model = Llama(TINY)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return model


def _run(work: Path, folder: Path, steps: int = 6) -> train.Run:
    member = Member(TINY, windows=4, part=2, vector_rate=0.004)
    run = train.Run(member, work, folder, "cpu", "dense", compiled=False)
    run.steps = run.steps or steps
    return run


def _losses(folder: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["train"]) for line in lines if "train" in line]


def test_an_interrupted_run_has_the_same_losses(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    assert _run(work, tmp_path / "whole").train()
    assert not _run(work, tmp_path / "halves").train(stop_at=3)
    lost = _run(work, tmp_path / "halves")
    lost.take(1.0)  # a step after the checkpoint, lost with its log
    lost.log(train=99.0)
    resumed = _run(work, tmp_path / "halves", steps=1000)
    assert (resumed.step, resumed.steps) == (3, 6)
    assert resumed.train()
    whole = _losses(tmp_path / "whole")
    assert whole == _losses(tmp_path / "halves")
    assert [step for step, _ in whole] == [1, 2, 3, 4, 5, 6]
    assert whole[-1][1] < whole[0][1] - 0.3
    last = json.loads((tmp_path / "whole/log.jsonl").read_text().splitlines()[-1])
    assert last["validation"].keys() == {"python-stdlib"}  # the others are shorter than a window


def test_a_probe_leaves_no_trace(work: Path, tmp_path: Path):
    run = _run(work, tmp_path / "probed")
    run.plan(minutes=0.01)
    assert run.steps >= 1
    assert run.step == 0
    fresh = _run(work, tmp_path / "fresh")
    assert run.take(1.0) == fresh.take(1.0)
    assert run.take(1.0) == fresh.take(1.0)


def test_a_probe_halves_what_does_not_fit(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = _run(work, tmp_path / "large")
    take, tried = run.take, []

    def small(scale: float) -> torch.Tensor:
        tried.append(run.part)
        if run.part > 1:
            raise torch.OutOfMemoryError
        return take(scale)

    monkeypatch.setattr(run, "take", small)
    run.probe(0.0)
    assert tried == [2, 1, 1, 1]
    torch.testing.assert_close(take(1.0), _run(work, tmp_path / "whole").take(1.0))


def test_shards_are_small_and_whole():
    weights = {str(i): torch.zeros(3 << 20, dtype=torch.bfloat16) for i in range(6)}
    parts = shards(weights)
    assert [len(part) for part in parts] == [2, 2, 2]
    assert list(weights) == [name for part in parts for name in part]


def test_what_is_exported_is_what_was_trained(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr("benchmarks.reference_models.export.SHARD_BYTES", 50_000)
    model = _lively()
    export(model, TINY, tmp_path, tokenizer)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.randint(8, TINY.vocab_size, (1, 100), generator=torch.Generator().manual_seed(0))
    rounded = Llama(TINY)
    state = {name: weight.bfloat16().float() for name, weight in model.state_dict().items()}
    rounded.load_state_dict(state)
    expected = rounded(ids)[0].detach()
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(oracle(ids).logits[0].detach(), expected, atol=1e-3, rtol=1e-3)
    engine = LM(tmp_path, dtype="fp32", budget=0).engine
    rows: list[np.ndarray] = []
    engine.start(ids[0].numpy().astype(np.int32), lambda _, __, found: rows.append(found.copy()))
    ours = torch.from_numpy(np.concatenate(rows))
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)
    chat = [{"role": "user", "content": "a ship"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    prompt = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert prompt == open_tokenizer(tmp_path).encode_chat(chat)
    assert theirs("a ship").input_ids == open_tokenizer(tmp_path).encode("a ship")


def test_a_model_is_measured_and_gets_its_card(
    shared: Path, tokenizer: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    run = _run(work, tmp_path, steps=3)
    run.train()
    model = tmp_path / "export"
    export(run.model, TINY, model, tokenizer)
    train.describe(run, "tiny", model)
    (shared / "data/blimp").mkdir()
    (shared / "data/lambada").mkdir()
    pair = {"sentence_good": "the king saw", "sentence_bad": "<<<>>> 77", "UID": "a"}
    pairs = [pair | {"linguistics_term": "order", "UID": uid} for uid in ("a", "a", "b")]
    passages = [{"text": "the old king saw a grey ship"}]
    for name, lines in (("blimp/blimp", pairs), ("lambada/lambada_test", passages)):
        text = "\n".join(map(json.dumps, lines))
        (shared / "data" / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    monkeypatch.setattr(evaluate, "SAMPLE_TOKENS", 5)
    words = [str(model), "--shared", str(shared), "--pairs", "1", "--passages", "1"]
    monkeypatch.setattr("sys.argv", ["evaluate", *words])
    evaluate.main()
    results = json.loads((model / "results.json").read_text())
    assert results["blimp"]["items"] == 2  # one of each paradigm
    assert results["blimp"]["accuracy"] == 1.0
    assert results["held_out"].keys() == sources.SOURCES.keys()
    card = (model / "README.md").read_text()
    assert f"{results['held_out']['peps']['bits_per_byte']} |" in card
    assert "| trained on | 1,536 tokens, " in card
    for name in ("loss.svg", "validation.svg"):
        assert ElementTree.parse(model / name).getroot().findall(".//{*}polyline")
    before = (model / "results.json").stat().st_mtime_ns
    monkeypatch.setattr("sys.argv", ["evaluate", *words, "--format", "int8"])
    evaluate.main()  # only prints
    assert (model / "results.json").stat().st_mtime_ns == before


def test_bits_per_byte_are_the_trained_models_own(tokenizer: Path, tmp_path: Path):
    model = _lively()
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    export(model, TINY, tmp_path, tokenizer)
    lm = LM(tmp_path, dtype="fp32", drafter="plain", budget=0)
    said = text(3)
    found = evaluate.bits_per_byte(lm, [said])
    ids = torch.tensor([[END_OF_TEXT, *lm.tokenizer.encode(said, special=False)]])[:, :128]
    assert ids.shape[1] == found["tokens"] + 1  # one window
    nats = train.head_loss(model, model.states(ids[:, :-1]), ids[:, 1:]).item()
    assert found["bits_per_byte"] == pytest.approx(nats / np.log(2) / len(said), abs=1e-3)


def test_int8_is_half_the_file_and_nearly_the_same_model(tokenizer: Path, tmp_path: Path):
    export(_lively(), TINY, tmp_path / "wide", tokenizer)
    convert(tmp_path / "wide", tmp_path / "narrow")
    wide, narrow = LM(tmp_path / "wide", budget=0), LM(tmp_path / "narrow", budget=0)
    assert narrow.engine.format == "int8:head=bf16"
    found = [evaluate.bits_per_byte(lm, [text(3)])["bits_per_byte"] for lm in (wide, narrow)]
    assert found[1] == pytest.approx(found[0], rel=0.005)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("wide", "narrow")]
    embedding = 2 * TINY.vocab_size * TINY.hidden_size
    assert sizes[1] - embedding < 0.6 * (sizes[0] - embedding)


@settings(deadline=None)
@given(documents=st.lists(st.text(max_size=9)), most=st.integers(0, 40))
def test_cut_texts_are_the_beginning(documents: list[str], most: int):
    kept = evaluate.cut(documents, most)
    size = len("".join(kept).encode())
    assert "".join(documents).startswith("".join(kept))
    whole = len("".join(documents).encode())
    assert min(most, whole) - 3 <= size <= most
