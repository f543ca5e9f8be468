"""Attention with its keys and values in other processes (Lamina): an experiment, with numbers.

    python benchmarks/attention_workers.py MODEL --contexts 1024 4096 --workers 1 2 --groups 2

While a batch decodes, its matrices are read once for all sequences, but keys and values once for
each: they want other machines, with much memory. Here one process multiplies matrices, and workers
hold keys and values, each those of some heads, and attend; queries, new rows and results travel for
every layer. As in "Efficient and Economic Large Language Model Inference with Attention Offloading"
(Chen et al. 2024, arXiv 2405.01814), queries are sent before keys and values are computed, so that
workers begin with the positions that they hold, and the new one is added to their sums; and
requests form groups that take turns, so that one group's matrices are multiplied while the workers
attend for another.

Sequences begin with `--contexts` random keys and values, and run `--steps` tokens, one in each
step: `here` in this process alone, `away` one group after the other, in `turns` as described.
Logits must be those of `here` but for rounding. `--hop` seconds are added to every message.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.engines.pipeline.wire import Link, WireError
from paceline.models import load
from paceline.models.blocks import (
    final_state,
    head,
    keys_values,
    mlp,
    norm,
    project,
    queries,
    rotation_of,
    scaled,
    softcap,
)
from paceline.models.config import ModelConfig
from paceline.models.tensors import to_dense

ARMS = ("away", "turns")


class Sums(NamedTuple):
    """Attention over some positions, before it is divided: largest score, sum, weighted values."""

    most: Tensor  # [B, H, 1]
    total: Tensor  # [B, H, 1]
    values: Tensor  # [B, H, D]


class Rows:
    """Keys and values of some heads of one layer: those of B sequences, of one length.

    Args:
        keys, values: [B, G, S, D].
        more: rows that there must be room for.
    """

    def __init__(self, keys: Tensor, values: Tensor, more: int) -> None:
        room = (0, 0, 0, more)
        self.keys, self.values = F.pad(keys, room), F.pad(values, room)
        self.length = keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add a row [B, G, D] of each sequence."""
        self.keys[:, :, self.length], self.values[:, :, self.length] = keys, values
        self.length += 1

    def attend(self, q: Tensor, config: ModelConfig, first: int, last: int) -> Sums:
        """Return the sums of queries [B, H, D] over rows from `first` to `last`."""
        shape = (
            len(q),
            self.keys.shape[1],
            -1,
            q.shape[2],
        )  # queries by the head whose keys they read
        grouped = q.view(shape)
        scores = grouped @ self.keys[:, :, first:last].mT * config.attention_scale
        scores = softcap(scores, config.attention_softcap)
        most = scores.amax(-1, keepdim=True)
        shares = (scores - most).exp()
        values = shares @ self.values[:, :, first:last]
        total = shares.sum(-1, keepdim=True)
        return Sums(*(each.reshape(*q.shape[:2], -1) for each in (most, total, values)))


def combined(one: Sums, other: Sums) -> Tensor:
    """Return attention [B, H, D] over the positions of both."""
    most = torch.maximum(one.most, other.most)
    a, b = (one.most - most).exp(), (other.most - most).exp()
    return (one.values * a + other.values * b) / (one.total * a + other.total * b)


def filled(
    config: ModelConfig, layer: int, group: int, batch: int, context: int, heads: slice, more: int
) -> Rows:
    """Return random rows, the same in every process."""
    shape = config.layers[layer]
    random = torch.Generator().manual_seed(1000 * group + layer)
    size = batch, shape.kv_heads, context, shape.head_dim
    keys = torch.randn(size, generator=random)[:, heads]
    return Rows(keys, torch.randn(size, generator=random)[:, heads], more)


class Task(NamedTuple):
    """What is decoded.

    Attributes:
        config: of the model.
        groups: that take turns.
        batch: sequences of a group.
        context: rows of each sequence at first.
        steps: tokens that each gets.
    """

    config: ModelConfig
    groups: int
    batch: int
    context: int
    steps: int

    def rows(self, heads: slice) -> list[list[Rows]]:
        """Return the rows of some heads, of each group and layer."""
        return [
            [
                filled(self.config, layer, group, self.batch, self.context, heads, self.steps)
                for layer in range(len(self.config.layers))
            ]
            for group in range(self.groups)
        ]


def attend_for_others(
    address: tuple[str, int], task: Task, heads: slice, hop: float, threads: int
) -> None:
    """Hold rows, and attend, until the connection ends: a worker's process."""
    torch.set_num_threads(threads)
    link = Link(socket.create_connection(address), hop)
    rows = task.rows(heads)
    link.send({"kind": "ready", "first": heads.start})
    try:
        while True:
            to, [q] = link.receive()
            held = rows[to["group"]][to["layer"]]
            sums = held.attend(torch.from_numpy(q), task.config, 0, held.length)
            _, [keys, values] = link.receive()
            held.append(torch.from_numpy(keys), torch.from_numpy(values))
            new = held.attend(torch.from_numpy(q), task.config, held.length - 1, held.length)
            link.send({"kind": "attended"}, [combined(sums, new).numpy()])
    except WireError:
        return  # the experiment is over


class Here:
    """Attention in this process."""

    def __init__(self, task: Task) -> None:
        self._config, self._rows = task.config, task.rows(slice(None))
        self._asked: dict[int, tuple[Rows, Tensor]] = {}
        self.sent = 0

    def ask(self, group: int, layer: int, q: Tensor) -> None:
        """Take the queries [B, H, D] of a layer."""
        self._asked[group] = self._rows[group][layer], q

    def add(self, group: int, keys: Tensor, values: Tensor) -> None:
        """Take new rows [B, G, D] of that layer."""
        self._asked[group][0].append(keys, values)

    def answer(self, group: int) -> Tensor:
        """Return what the queries attend to, [B, H, D]."""
        rows, q = self._asked.pop(group)
        sums = rows.attend(q, self._config, 0, rows.length)
        return sums.values / sums.total

    def close(self) -> None:
        """Do nothing."""


class Away:
    """Attention in workers, each of which has some heads of all sequences.

    Attributes:
        sent: bytes that travelled, both ways.
    """

    def __init__(self, task: Task, workers: int, hop: float, threads: int) -> None:
        kv_heads = task.config.layers[0].kv_heads
        ends = np.linspace(0, kv_heads, workers + 1).round().astype(int).tolist()
        self._parts = [slice(a, b) for a, b in pairwise(ends)]
        self._wide = task.config.layers[0].heads // kv_heads
        self.sent = 0
        spawn = multiprocessing.get_context("spawn")
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = server.getsockname()
            self._processes = [
                spawn.Process(target=attend_for_others, args=(address, task, part, hop, threads))
                for part in self._parts
            ]
            for process in self._processes:
                process.start()
            links = [Link(server.accept()[0], hop) for _ in self._parts]
        order = {link.receive()[0]["first"]: link for link in links}
        self._links = [order[part.start] for part in self._parts]

    def ask(self, group: int, layer: int, q: Tensor) -> None:
        """Send the queries [B, H, D] of a layer."""
        for link, part in zip(self._links, self._parts, strict=True):
            own = q[:, part.start * self._wide : part.stop * self._wide]
            self._send(link, {"group": group, "layer": layer}, own)

    def add(self, group: int, keys: Tensor, values: Tensor) -> None:
        """Send new rows [B, G, D] of that layer."""
        for link, part in zip(self._links, self._parts, strict=True):
            self._send(link, {}, keys[:, part], values[:, part])

    def answer(self, group: int) -> Tensor:
        """Wait for what the queries attend to, [B, H, D]; groups are answered in their order."""
        parts = [link.receive()[1][0] for link in self._links]
        self.sent += sum(part.nbytes for part in parts)
        return torch.from_numpy(np.concatenate(parts, 1))

    def _send(self, link: Link, head: dict[str, int], *tensors: Tensor) -> None:
        arrays = [each.contiguous().numpy() for each in tensors]
        self.sent += sum(each.nbytes for each in arrays)
        link.send(head, arrays)

    def close(self) -> None:
        """End the workers."""
        for link in self._links:
            link.close()
        for process in self._processes:
            process.join()


class Decoder:
    """Multiplies the matrices of a model, and leaves attention to others."""

    def __init__(self, model: str) -> None:
        opened = load(model)
        self.config = opened.config
        shapes = {(each.heads, each.kv_heads, each.window) for each in self.config.layers}
        if len(shapes) > 1 or self.config.layers[0].window or not self.config.layers[0].heads:
            raise SystemExit(f"{model} has layers of several kinds; take one that has them alike")
        self._layers: list[dict[str, Tensor]] = [{} for _ in self.config.layers]
        self._outer: dict[str, Tensor] = {}
        for name in opened.weights:
            tensor = torch.tensor(to_dense(opened.weights[name]))
            if name.startswith("layers."):
                _, index, rest = name.split(".", 2)
                self._layers[int(index)][rest] = tensor
            else:
                self._outer[name] = tensor

    def step(
        self, attention: Here | Away, group: int, tokens: Tensor, position: int
    ) -> Iterator[Tensor | None]:
        """Run a token [B] of each sequence; yield None at each layer, then the logits."""
        config, at = self.config, torch.tensor([position])
        x = F.embedding(tokens, self._outer["embed"])[:, None] * config.embedding_scale
        if config.learned_positions:
            x = x + self._outer["positions"][at + config.position_offset]
        for index, weights in enumerate(self._layers):
            layer = config.layers[index]
            rotation = rotation_of(layer, at)
            normed = norm(x, config, weights, "attn_norm")
            q = queries(normed, config, layer, weights, rotation)
            attention.ask(group, index, q[:, :, 0])
            keys, values = keys_values(normed, config, layer, weights, rotation)
            attention.add(group, keys[:, :, 0], values[:, :, 0])
            yield None
            mixed = attention.answer(group).flatten(1)[:, None]
            mixed = project(norm(mixed, config, weights, "attn_inner_norm"), weights, "o")
            after = x + scaled(
                norm(mixed, config, weights, "attn_post_norm"), config.residual_scale
            )
            feed = norm(x if config.parallel else after, config, weights, "mlp_norm")
            x = after + scaled(mlp(feed, config, weights), config.residual_scale)
        yield head(final_state(x[:, 0], config, self._outer), config, self._outer)


@torch.inference_mode()
def decode(
    decoder: Decoder, attention: Here | Away, task: Task, in_turns: bool
) -> tuple[Tensor, float]:
    """Run the tokens of all groups; return logits [steps, groups, B, V], and the seconds."""
    found = []
    start = perf_counter()
    for step in range(task.steps):
        tokens = (torch.arange(task.batch) * 5 + step * 7) % decoder.config.vocab_size
        runs = [
            decoder.step(attention, group, tokens, task.context + step)
            for group in range(task.groups)
        ]
        logits: list[Tensor] = []
        for wave in [runs] if in_turns else [[run] for run in runs]:
            while (made := [next(run) for run in wave])[0] is None:
                pass
            logits += [each for each in made if each is not None]
        found.append(torch.stack(logits))
    return torch.stack(found), perf_counter() - start


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a group")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--hop", type=float, default=0.0, help="seconds added to each message")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    decoder = Decoder(asked.model)
    layer, layers = decoder.config.layers[0], len(decoder.config.layers)
    found = {}
    for context in asked.contexts:
        task = Task(decoder.config, asked.groups, asked.batch, context, asked.steps)
        tokens = asked.groups * asked.batch * asked.steps
        expected, seconds = decode(decoder, Here(task), task, in_turns=False)
        held = 8 * asked.groups * asked.batch * context * layer.kv_heads * layer.head_dim * layers
        print(f"{context} positions, {held / 1e6:.0f} MB of keys and values")
        print(f"  here: {tokens / seconds:.1f} tokens/s", flush=True)
        found[f"{context}, here"] = {"tokens_per_second": tokens / seconds, "mb_here": held / 1e6}
        for workers in asked.workers:
            for name in asked.arms:
                in_turns = name == "turns"
                attention = Away(task, workers, asked.hop, asked.threads)
                logits, seconds = decode(decoder, attention, task, in_turns)
                attention.close()
                found[f"{context}, {workers} workers, {name}"] = {
                    "tokens_per_second": tokens / seconds,
                    "mb_here": 0.0,
                    "kb_per_token": attention.sent / tokens / 1e3,
                }
                print(
                    f"  {workers} workers, {name}: {tokens / seconds:.1f} tokens/s, "
                    f"{attention.sent / tokens / 1e3:.0f} kB a token",
                    flush=True,
                )
                if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3):
                    raise SystemExit("logits are not those of attention in this process")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
