"""How much less squared error of the outputs `gguf:feedback=true` leaves, for every type.

    python benchmarks/compression/feedback.py [--rows 256] [--inputs 768] [--type q4_0 ...]

A random matrix whose inputs are correlated and of different sizes, from fixed seeds. The second
moment is measured on eight positions for each input, the error on as many others.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from paceline.compress.base import Statistics
from paceline.compress.quantize.gguf import GGUFBlocks

TYPES = (
    *("q4_0", "q4_1", "q5_0", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
    *("iq4_nl", "iq4_xs"),
)


def inputs_of(count: int, random: np.random.Generator) -> Tensor:
    """Return correlated inputs whose channels differ in size, float32 [16 count, count]."""
    mix = random.standard_normal((count, count)) * random.gamma(0.5, 1, count)
    x = random.standard_normal((16 * count, count)) @ mix / count**0.5
    return torch.from_numpy(x.astype(np.float32))


def share(kind: str, weight: Tensor, x: Tensor) -> float:
    """Return the squared error of the outputs with feedback, as a share of that without."""
    method = GGUFBlocks(kind, feedback=True)
    seen, others = x.chunk(2)
    stats = Statistics().plus(seen, method.optional_statistics)
    with_it, without = (
        float(
            ((torch.from_numpy(each.compress(weight, stats).dense()) - weight) @ others.T)
            .square()
            .sum()
        )
        for each in (method, GGUFBlocks(kind))
    )
    return with_it / without


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--inputs", type=int, default=768, help="a multiple of 256")
    parser.add_argument("--type", nargs="+", choices=TYPES, default=TYPES)
    given = parser.parse_args()
    random = np.random.default_rng(0)
    weight = random.standard_normal((given.rows, given.inputs)).astype(np.float32)
    x = inputs_of(given.inputs, random)
    print("| " + " | ".join(given.type) + " |")
    print("|" + "---:|" * len(given.type))
    shares = (share(kind, torch.from_numpy(weight), x) for kind in given.type)
    print("| " + " | ".join(f"{each:.2f}" for each in shares) + " |")


if __name__ == "__main__":
    main()
