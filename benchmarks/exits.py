"""What exit policies lose on a text, and which share of the layers' parts they run.

Windows of a text are scored token by token, without a prompt, so that every position is subject to
the policy. The table gives the additional loss in nats a token over the whole model, its standard
error over windows, and how many of all attentions and MLPs were run.

    python benchmarks/exits.py MODEL --text FILE --exits calm:threshold=0.9 skip_decode:least=0.5
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from paceline.engines import open_engine
from paceline.engines.exiting import ExitingEngine
from paceline.models import load
from paceline.registry import exits
from paceline.scoring import score_tokens

EXITS = (
    "calm:threshold=0.99",
    "calm:threshold=0.9",
    "calm:threshold=0.99,measure=state",
    "ffn_skip:threshold=0.99",
    "ffn_skip:threshold=0.98",
    "ffn_skip:threshold=0.95",
    "skip_decode:most=0.95,least=0.95",
    "skip_decode:most=0.9,least=0.9",
    "skip_decode:most=0.75,least=0.75",
)


def losses(engine: ExitingEngine, windows: list[list[int]]) -> np.ndarray:
    """Return the mean negative log-probability of each window, in nats a token."""
    return np.array([-np.mean(score_tokens(engine, window).logprobs[1:]) for window in windows])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--exits", nargs="+", default=list(EXITS))
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    args = parser.parse_args()
    model = load(args.model)
    ids = model.tokenizer.encode(args.text.read_text(encoding="utf-8"))
    starts = np.linspace(0, len(ids) - args.length, args.windows).astype(int).tolist()
    windows = [ids[start : start + args.length] for start in starts]
    engine = open_engine(model, "reference", exits=exits.parse("skip_decode:least=1"))
    assert isinstance(engine, ExitingEngine)
    whole = losses(engine, windows)
    print(f"whole model: {whole.mean():.4f} nats a token, {args.windows} x {args.length} tokens\n")
    print("| policy | more nats a token | attentions run | MLPs run |\n| --- | --- | --- | --- |")
    for spec in args.exits:
        engine.exits, engine.nodes, engine.attended, engine.fed = exits.parse(spec), 0, 0, 0
        more = losses(engine, windows) - whole
        error = more.std(ddof=1) / len(more) ** 0.5 if len(more) > 1 else float("nan")
        ran = engine.attended / engine.nodes, engine.fed / engine.nodes
        print(f"| `{spec}` | {more.mean():+.3f} ± {error:.3f} | {ran[0]:.0%} | {ran[1]:.0%} |")


if __name__ == "__main__":
    main()
