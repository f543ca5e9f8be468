"""Every script under `benchmarks/` runs to its end, on tiny models and in seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from paceline import LM
from paceline.core import TokenTree
from paceline.models import load
from paceline.models.export.gguf import GGUFExport
from paceline.models.export.gguf_types import GGUFFormat
from tests.conftest import shared

ROOT = Path(__file__).parent.parent
SMALL = "{models}/stories260K"

# The shortest arguments that run every part of a script that needs nothing to be installed.
SMOKE = {
    "kernels.py": "--shape tiny --rounds 1 --threads 1 --megabytes 1",
    "activations.py": "{gguf} --rounds 1",
    "chunk_cache.py": SMALL
    + " --contexts 1 --length 384 --documents 3 --kinds copy --rounds 1 --threads 1",
    "step.py": "--shape tiny --format int8 --repeat 1 --sizes 1 4 --profile",
    "shapes.py": "--shape tiny --contexts 16 --rounds 1 --threads 1",
    "packed.py": "--shape tiny --group 32 --repeat 1 --threads 1",
    "exits.py": SMALL + " --text {words} --windows 2 --length 8 --exits calm skip_decode",
    "grouped.py": "--shape tiny --sizes 1 4 --rounds 1 --forms 3:32 4:64:zero 8:64:pairs 8:32:half"
    " 4:32:steps 4:32:steps_zero 4:32:levels 3:16:levels 5:32:table 3:32:eora"
    " --head-bits 6",
    "lookup.py": "--bits 2 3 --groups 32 --inputs 128 --megabytes 1 --rounds 1 --threads 1",
    "shared_prefix.py": "--shape tiny --context 70 --sequences 2 --nodes 1 --repeat 1",
    "peers.py": "--model {models}/stories260K --bits 16 --rounds 1 --prompt 16 --peer transformers",
    "end_to_end.py": SMALL + " --count 2 --format int8",
    "drafters.py": SMALL + " --documents 0:1 --drafters recycle blend --budgets 4",
    "letters.py": SMALL + " --outputs 1 --dictionary {words}",
    "grammars.py": SMALL + " --schemas 8 --drafter blend",
    "head_screen.py": SMALL + " --drafter plain --tokens 4 --rounds 1",
    "pipeline.py": SMALL
    + " --prompts {models}/../data/spec-bench/question.jsonl --nodes 2 --hop 0.001 --count 1"
    + " --tokens 6 --requests 3 --request-tokens 6 --kills 1",
    "attention_workers.py": SMALL
    + " --contexts 40 --workers 2 --batch 2 --steps 3 --hop 0.0001 --arms turns",
    "pipeline_batches.py": SMALL
    + " --prompts {models}/../data/spec-bench/question.jsonl --nodes 2 --users 2 --hop 0.001"
    + " --tokens 6 --rounds 1 --budgets plain --requests 4 --request-tokens 6 --kills 1",
    "prefill_apart.py": SMALL + " --length 150 --rounds 1 --memory 100000000 --kv-format fp32",
    "neuron_window.py": "--random 64:256:2 --tokens 16 --nodes 1 4 --shares 0.3",
    "streaming.py": SMALL
    + " --weights-memory 600KB --limit 2GB --prompts {models}/../data/spec-bench/question.jsonl"
    + " --count 1 --tokens 4 --megabytes 4 --batch 2 --drafters lookup",
    "heads.py": SMALL + " --formats int8 --sizes 8",
    "guided.py": SMALL + " --count 1 --rounds 1 --budget 4",
    "pearl.py": SMALL + " {models}/stories260K --count 1 --budget 4 --only-waits",
    "blend_prior.py": SMALL + " --limit 1 --new 8 --header {header}",
    "completions.py": SMALL + " --count 1 -n 2 --length 4",
    "first_token.py": SMALL + " --sizes 20 --rounds 3",
    "drafting.py": SMALL + " --requests 1 --passes 4",
    "long_prompts.py": SMALL
    + " --texts {models}/../text/peps.jsonl.xz --length 60 --count 1 --new 6"
    + " --drafters plain retrieved_context:sinks=1,chunk=8,pieces=2,tail=8,least=1.0",
    "long_context.py": SMALL + " --context 384 --contexts 1 --kinds copy --once --cache {cache}",
    "endless_dialogue.py": SMALL + " --tokens 1300 --rows 256 --chunk 64 --far 64 --host-blocks 4",
    "lossless.py": SMALL + " --rounds 1 --threads 1 --pruned 0.5",
    "kv_formats.py": SMALL
    + " --contexts 128 --rounds 1 --positions 90 --documents 1"
    + " --text {models}/../text/peps.jsonl.xz",
    "window_layers.py": SMALL
    + " --text {models}/../text/peps.jsonl.xz --skip 10 --length 80 --scored 40 --window 16",
    "formats.py": SMALL + " --documents 2",
    "proposals.py": SMALL + " --lessons 1 --drafters recycle --budgets 4 --requests 1 --passes 4",
    "predictions.py": SMALL + " --prompts 1 --budgets 4",
    "planner.py": SMALL + " --minutes 0.02 --goals exact --most 1 --tokens 4 --short",
    "watermarks.py": SMALL + " --texts 2 --plain 2 --tokens 12 --resamples 9",
    "sparse_prefill.py": "{models}/stories260K --lengths 300 --rounds 1",
    "prompt_filter.py": SMALL
    + " --context 384 --contexts 1 --kinds single --keep 64 --questions 1 --threads 1",
    "sparse_attention.py": "{models}/stories260K --lengths 200 --tokens 1 --rounds 1",
    "soak.py": "--minutes 0.05 --users 1 --kv-policies --model {models}/stories260K",
    "beyond_context.py": "{models}/stories260K --ends 300 600 --scored 64 --threads 1",
    "serving.py": SMALL + " --rounds 1 --requests 1 --tokens 4 --long 2 --part users stall prefix",
}
# Scripts that need what CI does not install, with the reason.
NEEDS = {
    "grammar_libraries.py": "xgrammar",
    "harness.py": "lm-eval; tests/measuring/test_harness.py runs its parts where that is",
    "keywords.py": "a hidden Markov model, which takes minutes to distil",
    "wheel_server.py": "the wheel xllamacpp",
}


def scripts():
    return {p.name for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text()}


def test_every_script_has_its_smoke_arguments_or_a_reason():
    assert scripts() == set(SMOKE) | set(NEEDS)


@pytest.mark.parametrize("script", SMOKE)
def test_it_runs_to_its_end(script, tmp_path):
    dictionary = tmp_path / "words.txt"
    dictionary.write_text("DAY  D EY1\nPLAY  P L EY1\nTHE  DH AH0\nONCE  W AH1 N S\n")
    paths = {"words": dictionary, "header": tmp_path / "prior.hpp", "gguf": tmp_path / "a.gguf"}
    paths["cache"] = tmp_path / "cache.json"
    if "{gguf}" in SMOKE[script]:
        model = load(shared("models") / "stories260K")
        GGUFExport(model, GGUFFormat("Q8_0", "Q8_0")).write(paths["gguf"])
    words = SMOKE[script].format(models=shared("models"), **paths).split()
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *words],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


def test_caches_of_the_reference_engine_are_compared():
    words = SMOKE["kv_formats.py"].format(models=shared("models")).split()
    more = ["--engine", "reference", "--formats", "auto", "gear:span=32,bits=2", "--contexts"]
    done = subprocess.run(
        [sys.executable, "benchmarks/kv_formats.py", *words, *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| gear:span=32,bits=2 |" in done.stdout


def run_gpu(*words):
    return subprocess.run(
        ["bash", "benchmarks/gpu.sh", *map(str, words)],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_run_on_a_gpu_is_tried_on_the_cpu(tmp_path):
    model = shared("models") / "stories260K"
    done = run_gpu("run", model, "--device", "cpu", "--smoke", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    [facts] = json.loads((tmp_path / "gpu.json").read_text())["models"].values()
    assert facts["skipped"] == {}
    assert list(facts["cost"]) == ["reference", "static"]
    speeds = facts["speed"]
    assert [*speeds] == [
        *("plain", "token_recycling@8", "recycle@8", "blend@8", "loop of graphs"),
    ]
    assert all(row["same"] == "2 of 2" for row in speeds.values())
    assert speeds["recycle@8"]["tokens_per_pass"] > 1
    assert all("0 bugs" in tally for tally in facts["proof"].values())
    assert done.stdout.strip() == (tmp_path / "gpu.md").read_text().strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_says_so(tmp_path):
    done = run_gpu("run", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("torch finds no CUDA device here; run this on")
    assert done.stderr.count("\n") == 1


def test_pieces_are_joined_by_their_sums(tmp_path):
    file, pieces, out = tmp_path / "a.gguf", tmp_path / "pieces", tmp_path / "out"
    file.write_bytes(bytes(range(256)) * 10)
    done = run_gpu("split", file, pieces, "--megabytes", 0.001)
    assert done.stdout == "a.gguf: 3 pieces\n"
    assert sorted(path.name for path in pieces.iterdir()) == [
        *(f"a.gguf.00{number}" for number in range(3)),
        "pieces.json",
    ]
    assert run_gpu("join", pieces, out).returncode == 0
    assert (out / "a.gguf").read_bytes() == file.read_bytes()
    assert "is there" in run_gpu("join", pieces, out).stdout
    (out / "a.gguf").unlink()
    (pieces / "a.gguf.001").write_bytes(b"changed")
    assert "has another sum" in run_gpu("join", pieces, out).stderr
    (pieces / "a.gguf.001").unlink()
    assert "a.gguf.001 is missing" in run_gpu("join", pieces, out).stderr
    assert not (out / "a.gguf").exists()


def test_the_training_of_heads_on_a_gpu_is_tried_on_the_cpu(tmp_path):
    model = shared("models") / "stories260K"
    words = ("--heads", "medusa:depth=2", "eagle:depth=2", "--out", tmp_path)
    done = run_gpu("heads", model, "--device", "cpu", "--smoke", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    table = (tmp_path / "heads.md").read_text()
    assert "`medusa:depth=2` | 4,096" in table
    with LM(model, drafter="plain", budget=0) as plain:
        whole = plain.generate("Once", max_new_tokens=24).tokens
    for name in ("medusa", "eagle"):
        with LM(model, drafter=f"head:path={tmp_path / 'stories260K' / name}", budget=4) as lm:
            assert lm.generate("Once", max_new_tokens=24).tokens == whole


def test_what_lanes_write_on_a_device_is_what_the_engine_predicts(monkeypatch):
    """Tokens that lanes fed, hidden states and predictions, beside those of the native engine."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    from own_text import Lanes

    model = load(shared("models") / "stories260K")
    lanes = Lanes(model, [[1, 300, 301], [1, 310]], 2, 24, torch.device("cpu"))
    record = lanes.write(40, lambda done: True)
    assert record.text.max() > 0  # a lane began its next prompt
    with LM(model.path, drafter="plain", budget=0) as lm:
        for lane in range(2):
            first = record.text[:, lane] == 0
            ids = record.tokens[first, lane].numpy()
            assert ids[:2].tolist() == [1, (300, 310)[lane]]
            sequence = lm.engine.open()
            logits = lm.engine.forward([(sequence, TokenTree.chain(ids))])
            hidden = lm.engine.hidden()
            lm.engine.release(sequence)
            kept = record.hidden[first, lane].float().numpy()
            np.testing.assert_allclose(kept, hidden, atol=0.05, rtol=0.02)  # bfloat16
            assert (record.top_tokens[first, lane, 0].numpy() == logits.argmax(1)).mean() > 0.9
            assert record.answer[first, lane].tolist() == [
                place >= (2, 1)[lane] for place in range(len(ids))
            ]
