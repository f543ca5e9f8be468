"""Train the small model that Paceline ships, on a CPU, within a given time.

The learning rate follows the elapsed share of `--minutes`, not a step count, so that the run
ends annealed on a machine of any speed. Interrupted, the same command resumes.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.embedded_model.corpus import prepare
from benchmarks.embedded_model.evaluate import load_stream, mean_loss
from benchmarks.embedded_model.export import export
from benchmarks.embedded_model.model import Llama, Shape
from benchmarks.embedded_model.recipe import optimisers, rate_scale

ROOT = Path(__file__).resolve().parents[2]
BATCH = 8  # windows of 512 tokens: small enough for many steps, large enough to fill two cores
LOG_STEPS = 100
SAVE_SECONDS = 180


def windows(stream: Tensor, step: int, length: int) -> tuple[Tensor, Tensor]:
    """Draw inputs and targets [B, T] for a step; a function of the step, so resuming is exact."""
    draw = torch.Generator().manual_seed(step)
    starts = torch.randint(len(stream) - length, (BATCH, 1), generator=draw)
    drawn = stream[starts + torch.arange(length + 1)]
    return drawn[:, :-1], drawn[:, 1:]


class Run:
    """A training run that can be saved and resumed."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.model = Llama(Shape())
        self.optimisers = optimisers(self.model)
        self.step = 0
        self.elapsed = 0.0  # seconds spent training, over all resumptions
        if (work / "checkpoint.pt").exists():
            self.load()

    def load(self) -> None:
        saved = torch.load(self.work / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(saved["model"])
        for optimiser, state in zip(self.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.step, self.elapsed = saved["step"], saved["elapsed"]
        # Steps after the checkpoint will be taken, and logged, again.
        lines = (self.work / "log.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        (self.work / "log.jsonl").write_text("".join(kept))

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
            "elapsed": self.elapsed,
        }
        torch.save(state, self.work / "checkpoint.tmp")
        (self.work / "checkpoint.tmp").replace(self.work / "checkpoint.pt")

    def log(self, **facts: float) -> None:
        record = {"step": self.step, "seconds": round(self.elapsed, 1), **facts}
        with (self.work / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def facts(self) -> dict[str, float]:
        tokens = self.step * BATCH * Shape().max_position_embeddings
        return {"steps": self.step, "tokens": tokens, "minutes": round(self.elapsed / 60, 1)}

    def train(self, seconds: float) -> None:
        """Train until `seconds` have been spent in total."""
        length = Shape().max_position_embeddings
        stream = load_stream(self.work / "train.npy")
        validation = load_stream(self.work / "validation.npy")
        forward = torch.compile(self.model)
        saved = self.elapsed
        losses = []
        began = time.monotonic() - self.elapsed
        while self.elapsed < seconds:
            scale = rate_scale(self.elapsed / seconds)
            inputs, targets = windows(stream, self.step, length)
            loss = F.cross_entropy(forward(inputs).flatten(0, 1), targets.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            for optimiser in self.optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = group["peak"] * scale
                optimiser.step()
                optimiser.zero_grad()
            losses.append(loss.item())
            self.step += 1
            self.elapsed = time.monotonic() - began
            if self.step % LOG_STEPS == 0:
                self.log(train=round(sum(losses) / len(losses), 4))
                losses.clear()
            if self.elapsed - saved > SAVE_SECONDS or self.elapsed >= seconds:
                self.log(validation=round(mean_loss(self.model, validation), 4))
                self.save()
                saved = self.elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and log")
    parser.add_argument("--text", type=Path, default=ROOT.parent / "shared" / "text")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2, help="1 is faster on a busy machine")
    parser.add_argument("--out", type=Path, default=ROOT / "src" / "paceline" / "embedded")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.work.mkdir(parents=True, exist_ok=True)
    prepare(arguments.text / "classic-books.jsonl.xz", arguments.work)
    run = Run(arguments.work)
    run.train(arguments.minutes * 60)
    export(run.model, run.facts(), arguments.work, arguments.out)


if __name__ == "__main__":
    main()
