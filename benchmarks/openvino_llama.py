"""OpenVINO: a Llama written as its graph, with the weights that we run.

The graph has the form that OpenVINO's own export of a transformers model has (stateful keys and
values, `beam_idx`, compressed weights as integers times a scale), so that its CPU plugin finds the
same fusions; no torch, no network. Settings are the plugin's own but for the latency hint and the
number of threads: it quantises activations in groups and keeps keys and values in 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats, Tokens
from paceline.models.config import ModelConfig

try:
    import openvino as ov
    from openvino import opset13 as op
    from openvino.op.util import Variable, VariableInfo
except ImportError:  # an optional peer
    ov = None

_END = np.iinfo(np.int64).max  # a slice to the end, as exports write it
GROUP = 64  # weights of an int4 scale: the largest that divides 576 inputs
Node = Any


def build() -> str | None:
    """Return the package and its version; None where it is not installed."""
    try:
        return f"openvino {version('openvino')}"
    except PackageNotFoundError:
        return None


class Graph:
    """A Llama under construction.

    In `int4` the embedding and the head stay `int8`, as OpenVINO's own weight compression keeps
    them.

    Args:
        config: its shape.
        weights: canonical name -> float32 array; each is read once.
        width: `int8`, one scale for each row, or `int4`, one for each `GROUP` weights of a row.
        rows: add the input `rows`, the positions of a pass whose logits are wanted. GenAI, which
            has its own way, needs a graph without.

    Attributes:
        bytes: size of the matrices that a pass multiplies with, scales included.
    """

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Floats], width: str, rows: bool = True
    ) -> None:
        if config.family != "llama" or not config.gated or config.norm != "rms":
            raise SystemExit(f"{config.family} cannot be written as a graph here: only Llama can")
        self.bytes = 0
        self._config, self._rows = config, rows
        self._matrices: dict[str, Node] = {}
        self._vectors: dict[str, Floats] = {}
        for name in weights:  # in the mapping's order: random weights are drawn in that order
            values = np.asarray(weights[name], np.float32)
            if values.ndim == 2:
                wide = width == "int8" or name in ("embed", "head")
                node, size = _bytes(values) if wide else _nibbles(values)
                self._matrices[name] = node
                self.bytes += 0 if name == "embed" and not config.tied else size
            else:
                self._vectors[name] = values
        self._sinks: list[Node] = []
        self._variables: list[Node] = []

    def model(self) -> Any:
        """Return the finished graph."""
        ids, mask, positions = (
            _input(name, [-1, -1], np.int64)
            for name in ("input_ids", "attention_mask", "position_ids")
        )
        beams = _input("beam_idx", [-1], np.int32)
        inputs = [ids, mask, positions, beams]
        x = op.gather(self._matrices["embed"], ids, _const(0))
        batch = op.gather(op.shape_of(ids), _const([0]), _const(0))
        visible = self._mask(mask, positions)
        turn = self._rotation(positions)
        for i in range(len(self._config.layers)):
            x = self._layer(f"layers.{i}.", x, visible, turn, beams, batch)
        if self._rows:
            inputs.append(_input("rows", [-1], np.int64))
            x = op.gather(x, inputs[-1], _const(1))
        head = "embed" if self._config.tied else "head"
        logits = op.result(self._product(self._norm(x, "final_norm"), head))
        logits.output(0).set_names({"logits"})
        return ov.Model([logits], self._sinks, inputs, self._variables, "llama")

    def _layer(
        self, at: str, x: Node, mask: Node, turn: tuple[Node, Node], beams: Node, batch: Node
    ) -> Node:
        layer = self._config.layers[0]
        normed = self._norm(x, at + "attn_norm")
        split = {"q": layer.heads, "k": layer.kv_heads, "v": layer.kv_heads}
        q, k, v = (
            op.transpose(
                op.reshape(
                    self._product(normed, at + name), _const([0, 0, count, layer.head_dim]), True
                ),
                _const([0, 2, 1, 3]),
            )
            for name, count in split.items()
        )
        q, k = _rotate(q, turn, layer.head_dim), _rotate(k, turn, layer.head_dim)
        seen = [
            self._shared(self._cached(f"{at}{name}", new, beams, batch))
            for name, new in (("key", k), ("value", v))
        ]
        scale = _const(self._config.attention_scale, np.float32)
        mixed = op.scaled_dot_product_attention(q, *seen, mask, scale, causal=False)
        width = layer.heads * layer.head_dim
        flat = op.reshape(op.transpose(mixed, _const([0, 2, 1, 3])), _const([0, 0, width]), True)
        x = op.add(x, self._product(flat, at + "o"))
        normed = self._norm(x, at + "mlp_norm")
        gate = op.swish(self._product(normed, at + "gate"))
        inner = op.multiply(gate, self._product(normed, at + "up"))
        return op.add(x, self._product(inner, at + "down"))

    def _cached(self, name: str, new: Node, beams: Node, batch: Node) -> Node:
        """All keys or values so far [B, KV heads, positions, D], the new ones kept."""
        layer = self._config.layers[0]
        info = VariableInfo()
        info.data_shape = ov.PartialShape([-1, layer.kv_heads, -1, layer.head_dim])
        info.data_type, info.variable_id = ov.Type.f32, name
        variable = Variable(info)
        shape = op.concat([batch, _const([layer.kv_heads, 0, layer.head_dim])], 0)
        empty = op.broadcast(_const(0.0, np.float32), shape)
        old = op.gather(op.read_value(empty, variable), beams, _const(0))
        both = op.concat([old, new], 2)
        self._sinks.append(op.assign(both, variable))
        self._variables.append(variable)
        return both

    def _shared(self, cached: Node) -> Node:
        """Every key/value head once for each of its query heads."""
        layer = self._config.layers[0]
        group = layer.heads // layer.kv_heads
        if group == 1:
            return cached
        wide = op.broadcast(
            op.unsqueeze(cached, _const(2)),
            _const([1, 1, group, 1, 1]),
            broadcast_spec="BIDIRECTIONAL",
        )
        return op.reshape(wide, _const([0, layer.heads, -1, layer.head_dim]), True)

    def _mask(self, attention_mask: Node, positions: Node) -> Node:
        """[B, 1, S, T]: 0 where a position sees another, else a large negative number."""
        length = op.gather(op.shape_of(attention_mask), _const(1), _const(0))
        keys = op.range(_const(0), length, _const(1), output_type="i64")
        hidden = op.greater(keys, op.unsqueeze(positions, _const([1, 3])))
        return op.select(hidden, _const(-65504.0, np.float32), _const(0.0, np.float32))

    def _rotation(self, positions: Node) -> tuple[Node, Node]:
        """Cosines and sines [B, 1, S, D]."""
        rope = self._config.layers[0].rope
        if rope is None or rope.scaling != "default":
            raise SystemExit("this rope scaling cannot be written as a graph here")
        powers = np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim
        inverse = (rope.theta**-powers).astype(np.float32)
        angles = op.multiply(
            op.convert(op.unsqueeze(positions, _const(2)), "f32"), _const(inverse[None, None])
        )
        both = op.concat([angles, angles], 2)
        cosines, sines = (op.unsqueeze(f(both), _const(1)) for f in (op.cos, op.sin))
        return cosines, sines

    def _norm(self, x: Node, name: str) -> Node:
        mean = op.reduce_mean(op.power(x, _const(2.0, np.float32)), _const([-1]), True)
        root = op.sqrt(op.add(mean, _const(self._config.norm_eps, np.float32)))
        normed = op.multiply(x, op.divide(_const(1.0, np.float32), root))
        return op.multiply(normed, _const(self._vectors[name]))

    def _product(self, x: Node, name: str) -> Node:
        return op.matmul(x, self._matrices[name], False, True)


class OpenVino:
    """One model and one sequence; see `peers.Runner`."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Floats], threads: int, width: str
    ) -> None:
        graph = Graph(config, weights, width)
        self.bytes = graph.bytes
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self._compiled = ov.Core().compile_model(graph.model(), "CPU", settings)
        self._request = self._compiled.create_infer_request()
        self._length = 0

    def extend(self, tokens: Tokens, logits: bool) -> Floats | None:
        """Run `tokens` [n] in one call and keep them; logits [n, V] until the next call, or None.

        Without logits the last token's are computed all the same, as GenAI does.
        """
        n, start = len(tokens), self._length
        self._length += n
        self._request.infer(
            {
                "input_ids": np.asarray(tokens, np.int64)[None],
                "attention_mask": np.ones((1, self._length), np.int64),
                "position_ids": np.arange(start, self._length)[None],
                "beam_idx": np.zeros(1, np.int32),
                "rows": np.arange(0 if logits else n - 1, n),
            },
            share_inputs=True,
        )
        return self._request.get_output_tensor(0).data[0] if logits else None

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        if length == 0:
            self._request.reset_state()
        elif length < self._length:
            for state in self._request.query_state():
                state.state = ov.Tensor(np.ascontiguousarray(state.state.data[:, :, :length]))
        self._length = length

    def fusions(self) -> dict[str, int]:
        """How many of each kind of operation the plugin runs."""
        counts: dict[str, int] = {}
        for node in self._compiled.get_runtime_model().get_ops():
            kind = node.get_rt_info()["layerType"].astype(str)
            counts[kind] = counts.get(kind, 0) + 1
        return counts


def save(config: ModelConfig, weights: Mapping[str, Floats], width: str, folder: Path) -> None:
    """Write the graph where GenAI looks for it."""
    model = Graph(config, weights, width, rows=False).model()
    ov.save_model(model, str(folder / "openvino_model.xml"), compress_to_fp16=False)


def _bytes(values: Floats) -> tuple[Node, int]:
    """f32 [out, in] as bytes times a scale for each row, in the form that the plugin looks for."""
    scales = np.abs(values).max(1, keepdims=True) / np.float32(127)
    codes = op.constant(_codes(values, scales, 127))
    scaled = op.multiply(op.convert(codes, "f16"), _const(scales.astype(np.float16)))
    return op.convert(scaled, "f32"), values.size + 2 * scales.size


def _nibbles(values: Floats) -> tuple[Node, int]:
    """f32 [out, in] as nibbles times a scale for each `GROUP` of a row."""
    rows, columns = values.shape
    blocks = values.reshape(rows, -1, GROUP if columns % GROUP == 0 else columns)
    scales = np.abs(blocks).max(2, keepdims=True) / np.float32(7)
    nibbles = _codes(blocks, scales, 7).view(np.uint8).reshape(-1) & 15
    packed = nibbles[0::2] | nibbles[1::2] << 4
    own = ov.Tensor(ov.Type.i4, ov.Shape(blocks.shape))  # one made of `packed` would only borrow it
    own.data.reshape(-1).view(np.uint8)[:] = packed
    codes = op.constant(own)
    scaled = op.multiply(op.convert(codes, "f16"), _const(scales.astype(np.float16)))
    flat = op.reshape(scaled, _const([rows, columns]), False)
    return op.convert(flat, "f32"), packed.size + 2 * scales.size


def _codes(values: Floats, scales: Floats, limit: int) -> NDArray[np.int8]:
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    return np.clip(np.rint(values * inverse), -limit, limit).astype(np.int8)


def _rotate(x: Node, turn: tuple[Node, Node], dim: int) -> Node:
    """Rotate the halves of a head: [-second, first] times the sines, plus x times the cosines."""
    half = dim // 2
    first, second = (
        op.slice(x, _const([start]), _const([stop]), _const([1]), _const([3]))
        for start, stop in ((0, half), (half, _END))
    )
    minus = op.multiply(second, _const(-1.0, np.float32))
    turned = op.concat([minus, first], -1)
    return op.add(op.multiply(x, turn[0]), op.multiply(turned, turn[1]))


def _input(name: str, shape: list[int], kind: type) -> Node:
    node = op.parameter(shape, kind)
    node.set_friendly_name(name)
    node.output(0).set_names({name})
    return node


def _const(value: object, kind: type | None = None) -> Node:
    array = np.asarray(value)
    if kind is None and array.dtype.kind == "i":
        kind = np.int64
    return op.constant(array.astype(kind) if kind else array)
