"""Check the shipped files against `transformers`: same logits, lossless tokenizer."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.embedded_model.export import load_exported
from benchmarks.embedded_model.model import Shape

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
HARD_TEXT = "  Once upon\ta time…\r\n\n— “Grüße”, 日本語, 🐇\x00 <b>x**2</b>\n"


@torch.no_grad()
def largest_difference(folder: Path) -> float:
    """Return the largest difference of logits over one full window of random tokens."""
    shape = Shape()
    draw = torch.Generator().manual_seed(0)
    size = (1, shape.max_position_embeddings)
    tokens = torch.randint(shape.vocab_size, size, generator=draw)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return float((oracle(tokens).logits - load_exported(folder)(tokens)).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "src/paceline/embedded")
    folder = parser.parse_args().folder
    difference = largest_difference(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    returned = tokenizer.decode(tokenizer(HARD_TEXT).input_ids)
    print(f"largest logit difference {difference:.2e}, allowed {TOLERANCE:.0e}")
    print(f"tokenizer round trip {'kept' if returned == HARD_TEXT else 'changed'} the text")
    if difference > TOLERANCE or returned != HARD_TEXT:
        raise SystemExit("the shipped files do not say what was trained")


if __name__ == "__main__":
    main()
