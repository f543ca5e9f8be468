"""lm-evaluation-harness: its model `hf` beside Paceline's, in process and through HTTP.

    python benchmarks/harness.py MODEL [--count 200] [--models hf paceline http auto]

MODEL is a folder or a GGUF file. `hf` is transformers on the weights in float32, `paceline` our
engine on the same (`dtype=fp32`), `http` the harness's `local-completions` on a server of that
engine, `auto` our engine on the file's own bits. The tasks are `harness_tasks.py`'s, on documents
of `../shared`. Prints a Markdown table: each task's metric with its standard error, the largest
difference of a document's log-likelihood to that of the first model, and for generation the share
of equal texts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lm_eval
import transformers
from lm_eval.tasks import TaskManager

import paceline.measuring.harness  # noqa: F401 (registers the model)
from benchmarks.harness_tasks import write_tasks
from benchmarks.soak import Server

SHARED = Path(__file__).resolve().parents[2] / "shared"
Results = dict[str, Any]


def evaluate(kind: str, arguments: dict[str, Any], folder: Path, names: list[str]) -> Results:
    """Return what the harness finds, with every document's own result.

    Args:
        kind: the harness's name of the model.
        arguments: of that model.
        folder: holds the tasks.
        names: those that are run.
    """
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=arguments,
        tasks=names,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=1000,
        log_samples=True,
        verbosity="ERROR",
    )
    assert found is not None
    return found


def scores(results: Results, name: str) -> list[Any]:
    """Return what the model answered for each document: log-likelihoods, or a text."""
    kept = []
    for sample in sorted(results["samples"][name], key=lambda sample: sample["doc_id"]):
        answers = [answer[0] for answer in sample["resps"]]
        kept.append([answer if isinstance(answer, str) else _first(answer) for answer in answers])
    return kept


def _first(answer: Any) -> float:
    return float(answer[0] if isinstance(answer, list | tuple) else answer)


def difference(ours: list[Any], theirs: list[Any]) -> float | None:
    """Return the largest difference of a log-likelihood; None for texts."""
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    if isinstance(pairs[0][0], str):
        return None
    return max(abs(a - b) for a, b in pairs)


def hf_arguments(model: Path, window: int) -> dict[str, Any]:
    """Return the arguments of `hf` for a folder or a GGUF file, in float32.

    Without its cache of logits, which gives wrong scores where two requests have the same tokens
    and split them differently into context and continuation.
    """
    common: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 1,
        "logits_cache": False,
    }
    common["max_length"] = window
    if model.suffix == ".gguf":
        return common | {"pretrained": str(model.parent), "gguf_file": model.name}
    return common | {"pretrained": str(model)}


def http_arguments(url: str, window: int, model: Path) -> dict[str, Any]:
    """Return the arguments of `local-completions` for a server.

    It sends tokens: those of the checkpoint's tokenizer, or for a GGUF file those of the server's.
    By itself it begins no text with a special token. It takes two tokens less than it is told for
    its windows.
    """
    tokenizer: dict[str, Any] = {"tokenizer_backend": "remote"}
    if model.suffix != ".gguf":
        begins = transformers.AutoTokenizer.from_pretrained(model)("a").input_ids
        alone = transformers.AutoTokenizer.from_pretrained(model)("a", add_special_tokens=False)
        tokenizer = {"tokenizer": str(model), "tokenizer_backend": "huggingface"}
        tokenizer["add_bos_token"] = begins != alone.input_ids
    return {
        "base_url": f"{url}/v1/completions",
        "max_length": window + 2,
        "batch_size": 1,
        **tokenizer,
    }


@contextlib.contextmanager
def chosen(kind: str, model: Path, window: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The harness's name of a model of ours, and its arguments."""
    if kind == "hf":
        yield "hf", hf_arguments(model, window)
    elif kind == "http":
        server = Server(["--model", str(model), "--format", "fp32"])
        try:
            yield "local-completions", http_arguments(server.url, window, model)
        finally:
            server.process.terminate()
            server.end()
    else:
        dtype = "fp32" if kind == "paceline" else kind
        yield "paceline", {"pretrained": str(model), "dtype": dtype, "max_length": window}


def rows(found: dict[str, Results], seconds: dict[str, float], names: list[str]) -> Iterator[str]:
    """Yield the lines of the table."""
    reference = next(iter(found))
    yield f"| task | metric | {' | '.join(found)} |"
    yield "|---" * (len(found) + 2) + "|"
    for name in names:
        for key, value in found[reference]["results"][name].items():
            metric = key.partition(",")[0]
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            cells = []
            for results in found.values():
                got = results["results"][name]
                error = got.get(key.replace(metric, f"{metric}_stderr"))
                plus = f" ± {error:.4f}" if isinstance(error, float) else ""
                cells.append(f"{got[key]:.4f}{plus}")
            yield f"| {name} | {metric} | {' | '.join(cells)} |"
        expected = scores(found[reference], name)
        cells = []
        for results in found.values():
            got = scores(results, name)
            change = difference(got, expected)
            equal = sum(a == b for a, b in zip(got, expected, strict=True))
            cells.append(f"{equal} of {len(got)}" if change is None else f"{change:.1e}")
        what = "equal texts" if isinstance(expected[0][0], str) else "largest difference, nats"
        yield f"| {name} | {what} | {' | '.join(cells)} |"
    yield f"| all | seconds | {' | '.join(f'{seconds[kind]:.0f}' for kind in found)} |"


def main() -> int:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=200, help="documents of each task")
    parser.add_argument("--models", nargs="+", default=["hf", "paceline", "http", "auto"])
    parser.add_argument("--characters", type=int, help="of each article; default: all")
    parser.add_argument("--window", type=int, default=510, help="tokens that a model sees at once")
    parser.add_argument("--tasks", nargs="+", help="default: all")
    parser.add_argument("--json", type=Path, help="each document's results")
    options = parser.parse_args()
    found: dict[str, Results] = {}
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_DATASETS_CACHE"] = f"{name}/cache"
        names = write_tasks(Path(name), SHARED, options.count, options.characters)
        names = options.tasks or names
        for kind in options.models:
            with chosen(kind, options.model, options.window) as (model, arguments):
                begun = time.perf_counter()
                found[kind] = evaluate(model, arguments, Path(name), names)
                seconds[kind] = time.perf_counter() - begun
                print(f"{kind}: {seconds[kind]:.0f} s", file=sys.stderr, flush=True)
    print("\n".join(rows(found, seconds, names)))
    if options.json:
        documents = {k: {n: scores(r, n) for n in names} for k, r in found.items()}
        options.json.write_text(json.dumps(documents))
    return 0


if __name__ == "__main__":
    sys.exit(main())
