"""Train one member of the family within a given time.

    python -m benchmarks.reference_models.train 30m --work build/reference --minutes 5

A probe of 30 seconds tells how many steps fit into `--minutes`; the rates follow the steps.
Interrupted, or ended by `--stop-after`, the same command resumes where the last checkpoint was,
with the steps planned at first. At the end the model is written to WORK/MODEL/export.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import Tensor
from torch.nn import functional as F

from benchmarks.embedded_model.model import Llama
from benchmarks.embedded_model.recipe import optimisers, rate_scale
from benchmarks.reference_models.export import export
from benchmarks.reference_models.family import MEMBERS, Member, flops, parameters
from benchmarks.reference_models.windows import Blocks, Dense, Windows, load

PROBE_SECONDS = 30.0
SAVE_SECONDS = 120.0
LOG_STEPS = 20
VALIDATIONS = 8  # in a run
VALIDATION_WINDOWS = 8  # of each source, a power of two; while training


def head_loss(model: Llama, states: Tensor, targets: Tensor) -> Tensor:
    """Return the sum over states [B, T, C] of nats for targets [B, T]."""
    logits = F.linear(states, model.model.embed_tokens.weight)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def compile_layers(model: Llama) -> None:
    """Compile one piece of code that serves all layers; every shape gets code of its own."""
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        layer.compile()


class Run:
    """A training run that can be saved and resumed.

    Args:
        member: what is trained.
        work: folder with the packed streams.
        folder: for its checkpoint and log.
        device: `cpu` or `cuda`.
        attention: `blocks` or `dense`; the numbers are the same up to rounding.
        compiled: whether layers and loss are compiled.
    """

    def __init__(
        self, member: Member, work: Path, folder: Path, device: str, attention: str, compiled: bool
    ) -> None:
        self.member, self.folder, self.device, self.attention = member, folder, device, attention
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        self.model = Llama(member.shape).to(device)
        self.optimisers = optimisers(self.model, member.vector_rate)
        self.loss = head_loss
        if compiled:
            compile_layers(self.model)
            self.loss = torch.compile(head_loss)
        self.step, self.steps, self.elapsed = 0, 0, 0.0  # elapsed: seconds, over all resumptions
        self.part = member.part
        self.masks = self._masks()
        length = member.shape.max_position_embeddings
        train = np.concatenate(list(load(work, "train").values()))
        self.windows = Windows(train, length, member.windows)
        self.held = load(work, "validation")
        self.packed = json.loads((work / "pack.json").read_text())
        if (folder / "checkpoint.pt").exists():
            self._load()

    def _masks(self) -> Blocks | Dense:
        if self.attention == "dense":
            return Dense()
        return Blocks(self.part, self.member.shape.max_position_embeddings, self.device)

    def _load(self) -> None:
        saved = torch.load(self.folder / "checkpoint.pt", weights_only=True, map_location="cpu")
        self.model.load_state_dict(saved["model"])
        for optimiser, state in zip(self.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        for name in ("step", "steps", "elapsed", "part"):
            setattr(self, name, saved[name])
        self.masks = self._masks()
        # Steps after the checkpoint will be taken, and logged, again.
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))

    def save(self) -> None:
        """Write the checkpoint; the last one is there until the new one is whole."""
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            **{name: getattr(self, name) for name in ("step", "steps", "elapsed", "part")},
        }
        torch.save(state, self.folder / "checkpoint.tmp")
        (self.folder / "checkpoint.tmp").replace(self.folder / "checkpoint.pt")

    @property
    def tokens_per_step(self) -> int:
        return self.member.windows * self.member.shape.max_position_embeddings

    def log(self, **facts: Any) -> None:
        tokens = self.step * self.tokens_per_step
        record = {"step": self.step, "tokens": tokens, "seconds": round(self.elapsed, 1), **facts}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)

    def nats(self, windows: Tensor) -> Tensor:
        """Return the summed loss of windows [B, T + 1]; B as the masks are made for."""
        if self.device == "cuda":
            windows = windows.pin_memory()  # so that the copy waits for nothing
        windows = windows.to(self.device, non_blocking=True)
        inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        mask = self.masks(inputs)
        with torch.autocast(self.device, torch.bfloat16):
            return self.loss(self.model, self.model.states(inputs, mask), targets)

    def take(self, scale: float) -> Tensor:
        """Take one step at `scale` of the peak rates; return its loss in nats per token."""
        total = torch.zeros((), device=self.device)
        for part in self.windows[self.step].split(self.part):
            loss = self.nats(part) / self.tokens_per_step
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * scale
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        return total

    def validate(self) -> dict[str, float]:
        """Return bits per byte of the first windows of each held-out stream, cold starts.

        With gradients that nobody asks for: without them everything would be compiled again.
        """
        length, found = self.member.shape.max_position_embeddings, {}
        for name, stream in self.held.items():
            starts = range(0, len(stream) - length, length)[:VALIDATION_WINDOWS]
            if not starts:
                continue
            rows = [stream[s : s + length + 1] for s in starts]
            rows = rows[: 1 << len(rows).bit_length() - 1]  # each is shown equally often
            times = max(1, self.part // len(rows))
            shown = torch.from_numpy(np.stack(rows * times).astype(np.int64))
            nats = [self.nats(part).item() for part in shown.split(self.part)]
            held = self.packed[name]["validation"]
            per_token = sum(nats) / shown[:, 1:].numel() / math.log(2)
            found[name] = round(per_token * held["tokens"] / held["bytes"], 4)
        return found

    def probe(self, seconds: float) -> float:
        """Return the seconds of a step, and undo the steps that measured it."""
        model = {name: weight.cpu().clone() for name, weight in self.model.state_dict().items()}
        while True:
            try:
                self.take(0.0).item()  # compiles
                break
            except torch.OutOfMemoryError:
                if self.part == 1:
                    raise
            self.part //= 2
            self.masks = self._masks()
            for optimiser in self.optimisers:
                optimiser.zero_grad()
            torch.cuda.empty_cache()
        self.take(0.0).item()
        taken, began = 0, time.monotonic()
        while time.monotonic() - began < seconds or not taken:
            self.take(0.0).item()
            taken += 1
        mean = (time.monotonic() - began) / taken
        self.model.load_state_dict(model)
        for optimiser in self.optimisers:
            optimiser.state.clear()
        self.step = 0
        return mean

    def plan(self, minutes: float) -> None:
        """Fix how many steps the run has, from a probe that counts towards `minutes`."""
        began = time.monotonic()
        mean = self.probe(min(PROBE_SECONDS, 6 * minutes))
        left = 60 * minutes - (time.monotonic() - began)
        self.steps = max(1, int(0.97 * left / mean))  # 3 % for saving and validation
        rate = self.tokens_per_step / mean
        work = flops(self.member.shape) * rate
        print(
            f"{parameters(self.member.shape):,} parameters, {mean:.3f} s a step, {rate:,.0f} tokens"
            f" a second, {work / 1e12:.2f} TFLOP/s, {self.part} windows at once; {self.steps} "
            f"steps, {self.steps * self.tokens_per_step / 1e6:.1f} M tokens",
            flush=True,
        )

    def train(self, stop_after: float = math.inf, stop_at: int | None = None) -> bool:
        """Train for at most `stop_after` seconds and up to step `stop_at`; return if it is done."""
        began, losses = time.monotonic(), []
        earlier, saved = self.elapsed, 0.0
        end = self.steps if stop_at is None else min(stop_at, self.steps)
        if self.step >= end:
            return self.step >= self.steps
        every = max(1, self.steps // VALIDATIONS)
        while self.step < end and time.monotonic() - began < stop_after:
            losses.append(self.take(rate_scale(self.step / self.steps)))
            if self.step % LOG_STEPS == 0 or self.step == end:
                mean = float(torch.stack(losses).mean())
                if not math.isfinite(mean):
                    raise SystemExit(f"the loss of step {self.step} is {mean}; lower the rates")
                self.elapsed = earlier + time.monotonic() - began
                self.log(train=round(mean, 4))
                losses.clear()
            if self.step % every == 0 or self.step == self.steps:
                self.elapsed = earlier + time.monotonic() - began
                self.log(validation=self.validate())
            if time.monotonic() - began - saved > SAVE_SECONDS:
                saved = time.monotonic() - began
                self.elapsed = earlier + saved
                self.save()
        self.elapsed = earlier + time.monotonic() - began
        self.save()
        return self.step >= self.steps


def describe(run: Run, name: str, folder: Path) -> None:
    """Write what the card says of the training: training.json and log.jsonl."""
    device = torch.cuda.get_device_name() if run.device == "cuda" else "a CPU"
    facts = {
        "name": f"paceline-{name}",
        "parameters": parameters(run.member.shape),
        "steps": run.step,
        "of_steps": run.steps,
        "tokens": run.step * run.tokens_per_step,
        "minutes": round(run.elapsed / 60, 1),
        "device": device,
        "attention": run.attention,
        "torch": torch.__version__,
        "validation_windows": VALIDATION_WINDOWS,
        "data": run.packed,
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    shutil.copyfile(run.folder / "log.jsonl", folder / "log.jsonl")


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MEMBERS)
    parser.add_argument("--work", type=Path, required=True, help="where pack.py wrote")
    parser.add_argument("--minutes", type=float, required=True, help="of the whole run")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="minutes of this call")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--attention", choices=("blocks", "dense"), help="blocks on a GPU")
    parser.add_argument("--eager", action="store_true", help="compile nothing; always on a CPU")
    options = parser.parse_args()
    began = time.monotonic()
    torch.set_float32_matmul_precision("high")
    attention = options.attention or ("dense" if options.device == "cpu" else "blocks")
    compiled = not options.eager and options.device != "cpu"
    folder = options.work / options.model
    run = Run(MEMBERS[options.model], options.work, folder, options.device, attention, compiled)
    if not run.steps:
        run.plan(options.minutes)
    done = run.train(60 * options.stop_after - (time.monotonic() - began))
    export(run.model, run.member.shape, folder / "export")
    describe(run, options.model, folder / "export")
    print("done" if done else f"{run.step} of {run.steps} steps; the same command goes on")


if __name__ == "__main__":
    main()
