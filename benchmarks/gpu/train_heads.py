"""One run on a GPU: heads for models, trained on millions of tokens that the models write there.

    python benchmarks/gpu/train_heads.py MODEL... --tokens 25000000 --minutes 9 --out heads

Every model gets an equal share of the minutes: at most half of it for writing answers to the mix of
prompts of `paceline train-head`, the rest for the heads, one after the other. Each head is written
as soon as it is trained, with its card, and `heads.md` has them all. `--device cpu --smoke` tries
all parts in seconds.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from own_text import TOP, Lanes, Record
from torch import Tensor

from paceline.drafters.heads.base import Head, HeadBatch, HeadTarget, head_target, save_head
from paceline.models import Model, load
from paceline.registry import heads
from paceline.training.prompt_mix import prompts_of

HEADS = ("recurrent:depth=4", "eagle:depth=4", "hydra:depth=4", "medusa:depth=4")
HELD = 50  # one of so many lanes is held out


class Batches:
    """Draws training batches from a record, lane by lane.

    Args:
        record: what the model wrote.
        depth: tokens that heads predict.
        held: whether of the held-out lanes.
    """

    def __init__(self, record: Record, depth: int, held: bool) -> None:
        self._depth, self._record = depth, record
        text, answer = record.text, record.answer
        lanes = torch.arange(text.shape[1], device=text.device)
        last = len(text) - depth - 1
        good = answer[:last] & (text[:last] == text[depth + 1 :])
        good &= (lanes % HELD == 0) == held
        self.lanes, self.starts = good.T.nonzero(as_tuple=True)  # one lane behind the other
        if not len(self.starts):
            raise SystemExit("the answers are too short to train on; give more tokens or minutes")

    def batch(self, chosen: Tensor) -> tuple[HeadBatch, Tensor]:
        """Return the batch of positions [N], and the tokens [U] of its columns of logits."""
        record, lane, start = self._record, self.lanes[chosen], self.starts[chosen]
        after = start[:, None] + 1 + torch.arange(self._depth + 1, device=start.device)
        tokens = record.tokens[after, lane[:, None]].long()
        top = record.top_tokens[after[:, :-1], lane[:, None]].long()
        probs = record.top_probs[after[:, :-1], lane[:, None]].float()
        used = torch.unique(torch.cat([top.flatten(), tokens[:, 1:].flatten()]))
        at = (lane * (1 << 20) + record.text[start, lane].long()) * (1 << 20) + start
        hidden = record.hidden[start, lane].float()
        return HeadBatch(hidden, tokens, torch.searchsorted(used, top), probs, at), used

    def order(self, size: int, run: int) -> Tensor:
        """Return random positions for a batch, in runs of neighbours."""
        runs = torch.randint(len(self.starts), (size // run, 1), device=self.starts.device)
        return ((runs + torch.arange(run, device=runs.device)) % len(self.starts)).flatten()


def train(
    head: Head, target: HeadTarget, record: Record, size: int, seconds: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train a head for so many seconds; return its tensors and what is known of it."""
    device = target.embedding.device
    trained, held = (Batches(record, head.depth, part) for part in (False, True))
    torch.manual_seed(0)
    start, steps, positions = perf_counter(), 0, 0
    parameters = {
        name: each.to(device).requires_grad_() for name, each in head.initial(target, 0).items()
    }
    optimizer = torch.optim.Adam(parameters.values(), lr=2e-3)
    rounded = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    while (spent := perf_counter() - start) < seconds or not steps:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * max(0.02, 1 - spent / seconds)
        batch, used = trained.batch(trained.order(size, head.run))
        with rounded:
            reduced = replace(target, unembedding=target.unembedding[used])
            loss = head.loss(head.columns(parameters, used), reduced, batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        steps, positions = steps + 1, positions + len(batch.hidden)
    card: dict[str, float] = {"positions": len(trained.starts), "seen": positions, "steps": steps}
    with torch.inference_mode():
        batch, _ = held.batch(held.order(min(size, 4096), head.run))
        right = torch.ones(len(batch.tokens), dtype=torch.bool, device=device)
        expected = 1.0
        for length, logits in enumerate(head.batch_logits(parameters, target, batch), 1):
            hit = logits.argmax(-1) == batch.tokens[:, length]
            card[f"right_at_{length}"] = round(float(hit.float().mean()), 4)
            right &= hit
            expected += float(right.float().mean())
    card |= {
        "chain_tokens_per_pass": round(expected, 3),
        "seconds": round(perf_counter() - start, 1),
    }
    return parameters, card


def run(model: Model, args: Any, seconds: float, out: Path) -> list[str]:
    """Write answers of a model and train all heads on them; return rows of the table."""
    device, start = torch.device(args.device), perf_counter()
    source: Any = SimpleNamespace(
        tokenizer=model.tokenizer, engine=SimpleNamespace(config=model.config)
    )
    prompts = [
        prompt
        for prompt in islice(prompts_of(source, None, args.seed), 4 * args.lanes)
        if 0 < len(prompt) < args.capacity // 2
    ]
    lanes = Lanes(model, prompts, args.lanes, args.capacity, device, seed=args.seed)
    passes = -(-args.tokens // args.lanes)
    record = lanes.write(passes, lambda done: perf_counter() - start < seconds / 2)
    del lanes
    written, spent = record.tokens.numel(), perf_counter() - start
    print(f"{model.name}: {written:,} tokens in {spent:.0f} s, {TOP} likeliest of each", flush=True)
    about = head_target(model)
    target = replace(
        about, embedding=about.embedding.to(device), unembedding=about.unembedding.to(device)
    )
    counts = torch.bincount(record.tokens[record.answer].long(), minlength=target.vocab_size)
    order = counts.argsort(descending=True)[:8192]
    frequent = [token for token in order.tolist() if counts[token] > 0]
    rows = []
    for place, spec in enumerate(args.heads):
        head: Head = heads.parse(spec)
        share = (seconds - (perf_counter() - start)) / (len(args.heads) - place)
        parameters, card = train(head, target, record, args.batch, max(share, 1.0))
        folder = out / model.name / head.name
        save_head(folder, head, parameters, about, model.fingerprint(), card, frequent)
        right = " ".join(f"{card[f'right_at_{k}']:.3f}" for k in range(1, head.depth + 1))
        rows.append(
            f"| {model.name} | `{spec}` | {written:,} | {card['seen']:,} | {card['seconds']} | "
            f"{right} | {card['chain_tokens_per_pass']:.2f} |"
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Train heads for all models and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--heads", nargs="+", default=list(HEADS))
    parser.add_argument("--tokens", type=int, default=25_000_000, help="of each model")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--lanes", type=int, default=2048)
    parser.add_argument("--capacity", type=int, default=384, help="most tokens of a text")
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("heads"))
    parser.add_argument("--smoke", action="store_true", help="tiny numbers, to try all parts")
    args = parser.parse_args()
    if args.smoke:
        args.tokens, args.minutes, args.lanes, args.batch, args.capacity = 4096, 0.15, 64, 128, 96
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; `--device cpu --smoke` tries all parts")
    title = "| model | head | tokens | seen | s | right by depth | tokens per pass, chain |"
    lines = [title, "|---|---|---|---|---|---|---|"]
    end = perf_counter() + args.minutes * 60
    args.out.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(args.models):
        share = (end - perf_counter()) / (len(args.models) - place)
        lines += run(load(name), args, share, args.out)
        (args.out / "heads.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
