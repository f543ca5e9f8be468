"""What windows in some layers of a model lose, with and without the first positions.

    python benchmarks/window_layers.py MODEL --text FILE.jsonl.xz [--window 256] [--full 0.34]
        [--sinks 0 1 4] [--documents 1] [--skip 2000] [--length 1024] [--scored 512]

Nothing is trained. A text are tokens `skip` to `skip + length` of a document; its last `scored`
tokens count. Losses are in nats a token beside those of the model itself, and divergences from its
distributions. Layers that see everything: every third or so, those in the middle, or the first and
the last ones.
"""

from __future__ import annotations

import argparse
import json
import lzma
from dataclasses import replace

import torch
from torch import Tensor

from paceline.compress.structure.longgen import LongGen, placed_layers
from paceline.models import blocks, load
from paceline.models.config import LayerConfig, ModelConfig


def log_probs(config: ModelConfig, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Return the log-probabilities [T, V] behind each token."""
    outer = {name: each for name, each in weights.items() if not name.startswith("layers.")}
    layers: list[blocks.LayerWeights] = [{} for _ in config.layers]
    for name, each in weights.items():
        if name.startswith("layers."):
            _, index, part = name.split(".", 2)
            layers[int(index)] = {**layers[int(index)], part: each}
    with torch.no_grad():
        return blocks.logits(ids[None], config, outer, layers)[0].log_softmax(-1)


def placed(layers: tuple[LayerConfig, ...], full: float) -> dict[str, set[int]]:
    """Return the layers that see everything, by where they are."""
    attending = [index for index, each in enumerate(layers) if each.heads]
    count = round(full * len(attending))
    ends = attending[: count // 2] + attending[len(attending) - (count - count // 2) :]
    found = {place: placed_layers(place, attending, count) for place in ("even", "middle")}
    return {**found, "ends": set(ends)}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--full", type=float, default=0.34)
    parser.add_argument("--sinks", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--skip", type=int, default=2000)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--scored", type=int, default=512)
    arguments = parser.parse_args()
    model = load(arguments.model)
    weights = {name: torch.tensor(model.weights.dense(name)) for name in model.weights}
    scored = slice(-arguments.scored - 1, -1)
    with lzma.open(arguments.text, "rt", encoding="utf-8") as lines:
        pairs = zip(range(arguments.documents), lines, strict=False)
        texts = [json.loads(line)["text"] for _, line in pairs]
    end = arguments.skip + arguments.length
    ids = [torch.tensor(model.tokenizer.encode(text)[arguments.skip : end]) for text in texts]
    own = [log_probs(model.config, weights, each)[scored] for each in ids]
    told = [each[1:][-arguments.scored :] for each in ids]
    loss = mean_loss(own, told)
    print(f"{sum(map(len, told))} tokens, {loss:.4f} nats")
    print("| layers that see everything | sinks | loss | divergence |\n|---|---:|---:|---:|")
    for place, full in placed(model.config.layers, arguments.full).items():
        for sinks in arguments.sinks:
            method = LongGen(window=arguments.window, sinks=sinks)
            layers = tuple(
                each if index in full else method.near(each)
                for index, each in enumerate(model.config.layers)
            )
            config = replace(model.config, layers=layers)
            found = [log_probs(config, weights, each)[scored] for each in ids]
            both = zip(own, found, strict=True)
            apart = [float((one.exp() * (one - two)).sum(-1).mean()) for one, two in both]
            lost = mean_loss(found, told) - loss
            print(
                f"| {place} | {sinks} | {lost:+.4f} | {sum(apart) / len(apart):.4f} |", flush=True
            )


def mean_loss(rows: list[Tensor], told: list[Tensor]) -> float:
    """Return the mean surprise of tokens, in nats."""
    pairs = zip(rows, told, strict=True)
    return float(torch.cat([-row.gather(1, ids[:, None])[:, 0] for row, ids in pairs]).mean())


if __name__ == "__main__":
    main()
