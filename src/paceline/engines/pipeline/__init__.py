"""Layers over machines: one model whose layers lie on several nodes, behind the engine contract.

Design. A model is split into contiguous parts (`engines/part.py`) that take about as long as each
other. The last part, with the head, stays in this process, so that logits and final hidden states
never travel; the others lie on nodes (`stage.py`: in this process, or in another one behind a
socket, `remote.py` and `worker.py`). `PipelineEngine` is an engine like any other: sessions,
drafters, batches, grammars and caches of prefixes do not know that it is one.

- A pass goes through the nodes in order. Only hidden states travel, float32 as they are, so that a
  pipeline computes the bits of one engine. What changes a cache (open, commit, truncate, fork,
  release) is sent without waiting for an answer; a connection keeps the order.
- Keys and values lie where their layers are. Pages are counted by the part in this process: every
  node holds as many pages for the same sequences.
- A pass takes a trip to every node, however many tree nodes it has. T(n) is measured with that, so
  that the governor picks large trees by itself. Large batches are cut into pieces that fill the
  pipeline: while a node runs one, the node behind it runs the piece before.
- Passes of different sequences are under way at once (`flight.py`): the thread that reads a node's
  answer hands it to the next node, so that passes advance while this process drafts, or runs the
  last part of another one. Nodes need no more than an order of their calls for that: between the
  pass of a sequence and what is committed of it, they run those of others.
- Faults. This process keeps what each node was given for committed positions: tokens, or hidden
  states (Petals' client-side cache of inputs). If a node is lost - its connection ends, or it is
  silent for too long - a replacement loads the same layers, and runs the kept inputs again, those
  of passes that had left the node but are not committed, too. Passes that it had begin anew.
  Engines are batch-invariant, so that no bit of a cache or a token changes.
- All nodes must have the same files (compared by a digest of their whole content), version and
  instruction set; what differs, or cannot be loaded, is told in one sentence.

Source: "Petals: Collaborative Inference and Fine-tuning of Large Models" (arXiv 2209.01188),
"Distributed Inference and Fine-tuning of Large Language Models Over The Internet" (2312.08361).
"""

from paceline.engines.pipeline.engine import PipelineEngine
from paceline.engines.pipeline.stage import LocalNodes, Nodes, Stage, StageLostError

__all__ = ["LocalNodes", "Nodes", "PipelineEngine", "Stage", "StageLostError"]
