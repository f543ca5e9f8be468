"""Linear maps of a checkpoint in int8: `python -m benchmarks.reference_models.int8 IN OUT`.

Embedding (and head) stay in bfloat16; `models.formats.compressed_tensors` has the format.
"""

import argparse
import json
import shutil
from pathlib import Path

from paceline.models.formats.compressed_tensors import pack, scheme
from paceline.models.formats.safetensors import Stored, open_tensors
from paceline.models.formats.writer import Pending, write_json, write_safetensors
from paceline.models.tensors import widen

KEPT = ("embed_tokens.weight", "lm_head.weight", "norm.weight")
DTYPES = {"_packed": "I32", "_scale": "BF16", "_shape": "I64"}


def parts(name: str, tensor: Stored) -> dict[str, Pending]:
    """Return the tensors that one tensor becomes."""
    if name.endswith(KEPT):
        return {name: Pending(tensor.shape, lambda: tensor.values, tensor.dtype)}
    packed = pack(widen(tensor.values, tensor.dtype))
    return {
        name + suffix: Pending(part.shape, lambda part=part: part, DTYPES[suffix])
        for suffix, part in packed.items()
    }


def convert(source: Path, target: Path) -> None:
    """Write `target`, a checkpoint in one file."""
    pending: dict[str, Pending] = {}
    for name, tensor in open_tensors(source).items():
        pending |= parts(name, tensor)
    target.mkdir(parents=True, exist_ok=True)
    write_safetensors(target / "model.safetensors", pending)
    settings = json.loads((source / "config.json").read_text())
    write_json(target / "config.json", settings | {"quantization_config": scheme()})
    for path in source.glob("*.json"):
        if path.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copyfile(path, target / path.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    convert(**vars(parser.parse_args()))
