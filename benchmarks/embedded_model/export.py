"""Turn a training run into the files that Paceline ships and the record kept beside this file."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file

from benchmarks.embedded_model.corpus import BOOKS, END_OF_TEXT
from benchmarks.embedded_model.evaluate import measure
from benchmarks.embedded_model.model import Llama, Shape
from benchmarks.embedded_model.plot import plot_loss

HERE = Path(__file__).resolve().parent

CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# The embedded model

A Llama of {parameters:,} parameters that writes sentences in the manner of old children's books,
so that Paceline can be tried and tested without a download. It is good for nothing else: it knows
no facts, and what a method gains on it says little about larger models.

| | |
|---|---|
| shape | {num_hidden_layers} layers, width {hidden_size}, {num_attention_heads} heads over \
{num_key_value_heads} key/value heads, context {max_position_embeddings} |
| vocabulary | {vocab_size:,} byte-level BPE pieces; any text survives a round trip |
| weights | float16, embeddings tied, Apache-2.0 |
| trained on | {tokens:,} tokens: {passes:.1f} passes over {books} public-domain books |
| held-out loss | {nats_per_token:.3f} nats per token, {bits_per_byte:.3f} bits per byte |

Greedy continuation of "Once upon a time":

> {sample}

The training code, the list of books and the loss log are in `benchmarks/embedded_model` of the
Paceline repository.
"""


def load_exported(folder: Path) -> Llama:
    """Load the shipped float16 weights into a float32 model."""
    model = Llama(Shape())
    stored = load_file(folder / "model.safetensors")
    model.load_state_dict({name: weight.float() for name, weight in stored.items()})
    return model.eval()


def write_json(path: Path, contents: object) -> None:
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_checkpoint(model: Llama, work: Path, out: Path) -> None:
    """Write the Hugging Face files, all but the card."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.half().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors writes files only their owner can read
    write_json(out / "config.json", Shape().config())
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    write_json(out / "generation_config.json", ends | {"do_sample": False})
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": Shape().max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    write_json(out / "tokenizer_config.json", tokenizer)
    shutil.copyfile(work / "tokenizer.json", out / "tokenizer.json")


def write_card(results: dict[str, object], sample: str, out: Path) -> None:
    quoted = sample.replace("\n", "\n> ").replace("> \n", ">\n")
    facts = asdict(Shape()) | results | {"books": len(BOOKS), "sample": quoted}
    (out / "README.md").write_text(CARD.format(**facts), encoding="utf-8")


def export(model: Llama, run: dict[str, float], work: Path, out: Path) -> None:
    """Write the shipped files to `out`; results.json, log.jsonl and loss.png beside this file.

    `run` holds the facts that only the training knows: steps, tokens, minutes. What is measured
    is the float16 model as shipped, not the float32 one that was trained.
    """
    write_checkpoint(model, work, out)
    corpus = json.loads((work / "corpus.json").read_text())
    measured = measure(load_exported(out), work)
    passes = round(run["tokens"] / corpus["train"]["tokens"], 2)
    results = {**run, "passes": passes, "corpus": corpus, **measured}
    write_json(HERE / "results.json", results)
    write_card(results, measured["greedy"][0], out)
    shutil.copyfile(work / "log.jsonl", HERE / "log.jsonl")
    plot_loss(HERE / "log.jsonl", HERE / "loss.png")
