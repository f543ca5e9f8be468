"""What a filtered prompt keeps of a long context, and the time to its first token.

The contexts and questions are those of `paceline eval --suite long`. Each question stands behind
its context as one prompt, so that the filter sees it. The gain kept is that of the suite: the
log-probability of the answers behind the kept tokens less that without a context, over the same
behind the whole context. Beside it stands the gain of as many of the last tokens of the prompt. The
times are those of reading the whole prompt, and of the filter with what it keeps, in turns.

    python benchmarks/prompt_filter.py MODEL [--data FOLDER] [--context 2048] [--contexts 5]
        [--kinds single multikey copy] [--keep 256 512] [--layers 8 11 14] [--threads 2]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

import numpy as np

from paceline import LM
from paceline.measuring.evaluation.long_context import KINDS, LongContexts
from paceline.measuring.evaluation.prefix import prefix_tokens
from paceline.scoring import token_logprobs

SHARED = Path(__file__).resolve().parents[2] / "shared"


def main() -> None:
    """Print a table of gains kept and of times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=SHARED / "text")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--contexts", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--keep", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--layers", type=int, nargs="+", default=[None])
    parser.add_argument("--questions", type=int, default=4, help="of a context, at most")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    lm = LM(args.model, drafter="plain", budget=0, threads=args.threads)
    suite = LongContexts(args.data, args.contexts, args.context)
    print(f"{lm!r}, contexts of {args.context} tokens, {args.contexts} of each kind")
    for kind in args.kinds:
        asked = []
        for item in suite.items:
            if item.content[0] == kind:
                context = suite.context(lm, item)
                asked += [(context.tokens, each) for each in context.questions[: args.questions]]
        whole = [answer(lm, [*tokens, *each.tokens], each.answer) for tokens, each in asked]
        start = list(prefix_tokens(lm, "auto"))
        none = sum(answer(lm, [*start, *each.tokens], each.answer)[0] for _, each in asked)
        gain = sum(nats for nats, _ in whole) - none
        print(f"{kind}: whole {sum(seconds for _, seconds in whole) / len(whole):.2f} s a prompt")
        for layer in args.layers:
            for keep in args.keep:
                print(f"  {row(lm, asked, layer, keep, none, gain)}", flush=True)


def row(lm, asked, layer, keep, none, gain) -> str:
    """Return the line of a filter layer and a number of tokens."""
    kept = last = seconds = 0.0
    lm.filter_prompt(asked[0][0], keep, layer=layer)  # opens the layers
    for tokens, each in asked:
        prompt = [*tokens, *each.tokens[: -each.answer]]
        begun = perf_counter()
        filtered = list(lm.filter_prompt(prompt, keep, layer=layer).tokens)
        seconds += perf_counter() - begun
        found, spent = answer(lm, [*filtered, *each.tokens[-each.answer :]], each.answer)
        kept, seconds = kept + found, seconds + spent
        near = [*prompt[:1], *prompt[1 - keep :], *each.tokens[-each.answer :]]
        last += answer(lm, near, each.answer)[0]
    name = "default layer" if layer is None else f"layer {layer}"
    return (
        f"{name:14s} keep {keep:5d}  gain kept {(kept - none) / gain:.2f}, by the last tokens "
        f"{(last - none) / gain:.2f}  {seconds / len(asked):.2f} s"
    )


def answer(lm, tokens, size) -> tuple[float, float]:
    """Return the log-probability of the last `size` tokens, and the seconds of a pass over all."""
    ids, rows = np.array(tokens, np.int32), []

    def observe(offset, tree, logits):
        following = ids[offset + 1 : offset + 1 + len(tree)]
        rows.extend(token_logprobs(logits[: len(following)], following))

    sequence = lm.engine.open()
    begun = perf_counter()
    lm.engine.extend(sequence, ids[: -size - 1])
    seconds = perf_counter() - begun
    base = len(ids) - size - 1
    lm.engine.extend(
        sequence, ids[base:-1], lambda offset, tree, logits: observe(base + offset, tree, logits)
    )
    lm.engine.release(sequence)
    return float(np.sum(rows)), seconds


if __name__ == "__main__":
    main()
