"""A model's own answers on a device, many at once, with hidden states and likeliest tokens.

Lanes answer prompts one after the other; a pass feeds one token to every lane, the next of its
prompt or the one drawn last. All state is on the device, so that one CUDA graph replays each pass.

Axes: B lanes, S positions of a lane's cache, P positions of prompts, Q prompts, K likeliest tokens,
D hidden size, T passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paceline.models import Model, blocks
from paceline.models.tensors import to_dense

TOP = 8  # likeliest tokens that are kept, and drawn from


@dataclass(frozen=True)
class Record:
    """What lanes wrote; `Tensor`s are on the device.

    Attributes:
        tokens: int32 [T, B], that each pass fed.
        answer: bool [T, B], whether the model itself had drawn it, or it was the last of a prompt.
        text: int32 [T, B], number of the lane's text.
        hidden: bfloat16 [T, B, D], behind each token.
        top_tokens: int32 [T, B, K], likeliest tokens behind each.
        top_probs: float16 [T, B, K], their probabilities.
    """

    tokens: Tensor
    answer: Tensor
    text: Tensor
    hidden: Tensor
    top_tokens: Tensor
    top_probs: Tensor


class Lanes:
    """Writes answers in lanes.

    Args:
        model: a checkpoint whose layers all have one shape, with full attention.
        prompts: token ids, taken in turns.
        lanes: B.
        capacity: S: a lane begins its next prompt when its text is so long.
        device: of torch.
        temperature: of the draws among the `TOP` likeliest tokens.
        seed: of the draws.
    """

    def __init__(
        self,
        model: Model,
        prompts: list[list[int]],
        lanes: int,
        capacity: int,
        device: torch.device,
        temperature: float = 0.7,
        seed: int = 0,
    ) -> None:
        self._config, self._device = model.config, device
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self._outer: dict[str, Tensor] = {}
        self._layers: list[dict[str, Tensor]] = [{} for _ in self._config.layers]
        for name in model.weights:
            tensor = torch.tensor(to_dense(model.weights[name])).to(device, dtype)
            if name.startswith("layers."):
                _, index, rest = name.split(".", 2)
                self._layers[int(index)][rest] = tensor
            else:
                self._outer[name] = tensor
        first = self._config.layers[0]
        shape = (2, lanes, first.kv_heads, capacity, first.head_dim)
        self._cache = [
            torch.zeros(shape, dtype=dtype, device=device).unbind() for _ in self._config.layers
        ]
        longest = max(map(len, prompts))
        padded = np.zeros((len(prompts), longest), np.int64)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        self._prompts = torch.from_numpy(padded).to(device)
        self._lengths = torch.tensor([len(each) for each in prompts], device=device)
        stops = sorted(model.defaults.stop_tokens) or [-1]
        self._stops = torch.tensor(stops, device=device)
        ropes = [layer.rope for layer in self._config.layers]
        tables = [None if rope is None else rope.table(0, capacity) for rope in ropes]
        self._tables = [
            None if each is None else tuple(torch.from_numpy(part).to(device) for part in each)
            for each in tables
        ]
        self._capacity, self._temperature = capacity, temperature
        self._lane = torch.arange(lanes, device=device)
        self._prompt = self._lane % len(prompts)  # of each lane
        self._taken = torch.tensor(lanes, device=device)
        self._position = torch.zeros_like(self._lane)
        self._text = torch.zeros_like(self._lane)
        self._token = self._prompts[self._prompt, 0]
        self._columns = torch.arange(capacity, device=device)
        torch.manual_seed(seed)

    @torch.inference_mode()
    def write(self, passes: int, progress: Callable[[int], bool]) -> Record:
        """Run passes; `progress`, called with the passes so far, says whether to go on."""
        lanes, device = len(self._lane), self._device
        size = self._config.hidden_size

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(passes, lanes, *shape, dtype=dtype, device=device)

        record = Record(
            empty(dtype=torch.int32),
            empty(dtype=torch.bool),
            empty(dtype=torch.int32),
            empty(size, dtype=torch.bfloat16),
            empty(TOP, dtype=torch.int32),
            empty(TOP, dtype=torch.float16),
        )
        replay = self._recorded()
        done = 0
        while done < passes and (done % 32 or self._reached(done, progress)):
            made = replay()
            for column, part in zip(vars(record).values(), made, strict=True):
                column[done] = part
            done += 1
        return Record(*(column[:done] for column in vars(record).values()))

    def _reached(self, done: int, progress: Callable[[int], bool]) -> bool:
        """Wait for the passes so far, and ask whether to go on."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return progress(done)

    def _recorded(self) -> Callable[[], tuple[Tensor, ...]]:
        """Return what runs a pass: a CUDA graph where there is one."""
        if self._device.type != "cuda":
            return self._step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # so that libraries allocate before the recording
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = self._step()

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return made

        return replay

    def _step(self) -> tuple[Tensor, ...]:
        """Feed one token to each lane, draw its next, and return a row of the record."""
        config, position = self._config, self._position
        length = self._lengths[self._prompt]
        fed = self._token.clone()
        made = (fed.int(), position >= length - 1, self._text.int())
        x = blocks.embed(fed[:, None], position[:, None], config, self._outer)  # [B, 1, D]
        mask = (self._columns <= position[:, None])[:, None, None]  # [B, 1, 1, S]
        for index in range(len(config.layers)):
            x = self._block(index, x, mask)
        hidden = blocks.final_state(x, config, self._outer)
        logits = blocks.head(hidden, config, self._outer)[:, 0].float()
        top, ids = logits.topk(TOP)
        probs = (top - logits.logsumexp(-1, keepdim=True)).exp()
        noise = -torch.empty_like(top).exponential_().log()
        drawn = ids.gather(1, (top / self._temperature + noise).argmax(-1, keepdim=True))[:, 0]
        follows = position + 1
        forced = self._prompts[self._prompt, follows.clamp(max=self._prompts.shape[1] - 1)]
        token = torch.where(follows < length, forced, drawn)
        ends = (follows >= length) & torch.isin(token, self._stops)
        ends = ends | (follows >= self._capacity)
        later = (self._taken + ends.cumsum(0) - 1) % len(self._prompts)
        self._prompt.copy_(torch.where(ends, later, self._prompt))
        self._taken.add_(ends.sum())
        self._text.add_(ends.long())
        self._position.copy_(torch.where(ends, 0, follows))
        self._token.copy_(torch.where(ends, self._prompts[self._prompt, 0], token))
        return (*made, hidden[:, 0].to(torch.bfloat16), ids.int(), probs.half())

    def _block(self, index: int, x: Tensor, mask: Tensor) -> Tensor:
        """Run a layer over the lanes' tokens [B, 1, D]; see `blocks.block`."""
        config, layer, weights = self._config, self._config.layers[index], self._layers[index]
        table, rotation = self._tables[index], None
        if table is not None:
            cos, sin = (part[self._position][:, None, None] for part in table)
            rotation = blocks.Rotation(cos, sin, layer.rope.adjacent)
        normed = blocks.norm(x, config, weights, "attn_norm")
        q, k, v = blocks.queries_keys_values(normed, config, layer, weights, rotation)
        for cache, new in zip(self._cache[index], (k, v), strict=True):
            cache[self._lane, :, self._position] = new[:, :, 0].to(cache.dtype)
        keys, values = self._cache[index]  # [B, G, S, head]
        groups = q.reshape(len(q), layer.kv_heads, -1, layer.head_dim)  # [B, G, H / G, head]
        scores = (groups @ keys.transpose(-1, -2)).float() * config.attention_scale
        shares = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(values.dtype)
        mixed = (shares @ values).reshape(len(q), 1, -1)
        attended = blocks.project(mixed, weights, "o")
        attended = blocks.norm(attended, config, weights, "attn_post_norm")
        x = x + blocks.scaled(attended, config.residual_scale)
        added = blocks.mlp(blocks.norm(x, config, weights, "mlp_norm"), config, weights)
        return x + blocks.scaled(added, config.residual_scale)
