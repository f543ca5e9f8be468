"""Sends a server what its OpenAPI document allows and forbids, by schemathesis.

    python scripts/fuzz_api.py [MODEL] --requests 50000

Every operation gets values at the edges of each field, random bodies, valid and not, and sequences
of calls. Fails for a status of 500 or more, an answer that the document does not describe, an error
in the server's log, or a server that ends. Prints how many answers had which status.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx2 as httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.soak import Server

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
LIMITS = ["--max-tokens", "4", "--max-answers", "4", "--max-body", "200kB"]
LONGEST = 120.0  # seconds of an answer, on a machine with other work


def answered(server: Server) -> dict[str, int]:
    """Return how many answers had each status, by the server's log."""
    return {status: count for status, count in sorted(server.log.items()) if status.isdecimal()}


def attack(url: str, document: Path, examples: int, seed: int, workers: int) -> int:
    """Run schemathesis once; return its exit code.

    Args:
        url: of the server.
        document: its OpenAPI document.
        examples: random ones of each operation.
        seed: of these.
        workers: how many ask at once.
    """
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "run", str(document), "--url", url),
        *("--checks", ",".join(CHECKS), "--max-examples", str(examples), "--seed", str(seed)),
        *("--workers", str(workers), "--mode", "all", "--generation-database", "none"),
        *("--request-timeout", str(LONGEST), "--suppress-health-check", "all", "--no-color"),
        "--continue-on-failure",
    ]
    return subprocess.run(command, env=os.environ | {"NO_COLOR": "1"}).returncode


def main() -> int:
    """Run; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="default: the embedded one")
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--examples", type=int, default=400, help="of an operation, each round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    server = Server([*(["--model", options.model] if options.model else []), *LIMITS])
    wrong, seed = False, options.seed
    with tempfile.TemporaryDirectory() as folder:
        document = Path(folder) / "openapi.json"
        document.write_bytes(httpx.get(f"{server.url}/openapi.json", timeout=LONGEST).content)
        while sum(answered(server).values()) < options.requests and not wrong:
            wrong = attack(server.url, document, options.examples, seed, options.workers) != 0
            wrong = wrong or server.process.poll() is not None
            print(f"after seed {seed}: {answered(server)}", flush=True)
            seed += 1
    server.process.send_signal(signal.SIGTERM)
    code = server.end()
    statuses = answered(server)
    wrong = wrong or bool(code or server.errors) or any(int(status) >= 500 for status in statuses)
    print(f"{sum(statuses.values())} answers by status: {statuses}; exit code {code}")
    print("\n".join(server.errors[:5]))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
