"""What a trained model is worth: its loss on held-out text and a few continuations."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from benchmarks.embedded_model.model import Llama, Shape

PROMPTS = ("Once upon a time", "The old king looked at", '"Where are you going?" said')
SAMPLE_TOKENS = 80


def load_stream(path: Path) -> Tensor:
    """Return a token stream as int64 [tokens]."""
    return torch.from_numpy(np.load(path).astype(np.int64))


@torch.no_grad()
def mean_loss(model: Llama, stream: Tensor) -> float:
    """Return nats per token of a stream [tokens]; each window of it starts without a past."""
    length = Shape().max_position_embeddings
    total = 0.0
    for start in range(0, len(stream) - 1, length):
        window = stream[start : start + length + 1]
        logits = model(window[None, :-1])[0]  # [T, V]
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / (len(stream) - 1)


@torch.no_grad()
def generate(model: Llama, tokenizer: Tokenizer, prompt: str, temperature: float = 0.0) -> str:
    """Continue a prompt by `SAMPLE_TOKENS`, greedily or by sampling with a fixed seed."""
    tokens = torch.tensor([tokenizer.encode(prompt).ids])
    draw = torch.Generator().manual_seed(0)
    for _ in range(SAMPLE_TOKENS):
        logits = model(tokens)[0, -1]
        if temperature:
            token = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=draw)
        else:
            token = logits.argmax(0, keepdim=True)
        tokens = torch.cat((tokens, token[None]), dim=1)
    return str(tokenizer.decode(tokens[0].tolist()))


def measure(model: Llama, work: Path) -> dict[str, Any]:
    """Return the model's size, held-out loss and samples."""
    corpus = json.loads((work / "corpus.json").read_text())
    stream = load_stream(work / "validation.npy")
    loss = mean_loss(model, stream)
    bits = loss / math.log(2) * (len(stream) - 1)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "nats_per_token": round(loss, 4),
        "bits_per_byte": round(bits / corpus["validation"]["bytes"], 4),
        "greedy": [generate(model, tokenizer, prompt) for prompt in PROMPTS],
        "temperature_0.8": [generate(model, tokenizer, prompt, 0.8) for prompt in PROMPTS],
    }
