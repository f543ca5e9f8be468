"""Prefill apart from decoding: other processes read long prompts and hand their pages over.

Design. A pass that reads a part of a prompt takes longer than one that only decodes, so that every
running stream waits for it. Here a long prompt is read by a prefill replica (`node.py`), a process
with the same model, and its keys and values come over as pages in the cache's own format, while the
next ones are computed. Engines are batch-invariant: a page has the bits that this process would
have computed, and no token changes.

- Where (`apart.py`). A request is admitted as always, so that its memory is counted here. If more
  than a threshold of its text is missing and a replica is free, that replica reads it; if all are
  busy, the prompt waits while others decode, and is read here while nobody does. What is less than
  a page at its end is read here, with the last token, whose logits begin the answer.
- Prefixes. What this process holds is looked up first and is not read again: a replica that does
  not hold it, too, is sent these pages. Replicas keep what they have read in a prefix cache.
- Faults (`pool.py`). A replica that ends, speaks otherwise or is silent is lost: its prompt is read
  on, from the last page that came, by another one or here, while a new one starts.
- Frames are those of pipelines (`engines/pipeline/wire.py`): a JSON head and arrays whose sizes are
  checked; nothing is unpickled. Each side proves by a secret that it was started by the other.

Source: "Splitwise: Efficient Generative LLM Inference Using Phase Splitting" (arXiv 2311.18677).
"""
