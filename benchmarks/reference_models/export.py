"""Write a model in Hugging Face format: bfloat16 shards, settings and tokenizer."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.embedded_model.model import Llama, Shape
from benchmarks.reference_models.sources import TOKENIZER

SHARD_BYTES = 15 << 20
END_OF_TEXT, END = 0, 4  # ids; see SPECIAL in vocabulary.py


def shards(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Divide weights, in order, into parts of at most `SHARD_BYTES`."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, weight in weights.items():
        size += weight.nbytes
        if size > SHARD_BYTES and parts[-1]:
            parts.append({})
            size = weight.nbytes
        parts[-1][name] = weight
    return parts


def write_json(path: Path, contents: object) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def export(model: Llama, shape: Shape, folder: Path, tokenizer: Path = TOKENIZER) -> None:
    """Write the checkpoint to `folder`, in place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    state = model.state_dict()
    weights = {name: w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in state.items()}
    parts = shards(weights)
    index: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        name = "model.safetensors" if len(parts) == 1 else name
        save_file(part, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors writes files only their owner can read
        index |= dict.fromkeys(part, name)
    if len(parts) > 1:
        total = sum(weight.nbytes for weight in weights.values())
        contents = {"metadata": {"total_size": total}, "weight_map": index}
        write_json(folder / "model.safetensors.index.json", contents)
    ends = {"bos_token_id": END_OF_TEXT, "eos_token_id": [END_OF_TEXT, END]}
    write_json(folder / "config.json", shape.config() | {"dtype": "bfloat16"} | ends)
    write_json(folder / "generation_config.json", ends | {"do_sample": False})
    for path in tokenizer.iterdir():
        shutil.copyfile(path, folder / path.name)
