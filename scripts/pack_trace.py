"""Pack what `paceline warm` recorded of a model into the small form that is shipped.

    paceline warm --model smollm2-135m --tokens 12000
    python scripts/pack_trace.py smollm2-135m

Ship only text of models whose licence allows it, and name it in
src/paceline/models/traces/README.md.
"""

from __future__ import annotations

import argparse

from paceline.models import load
from paceline.models.shipped_trace import FOLDER, pack_trace
from paceline.models.trace import read_trace, trace_path


def main() -> None:
    """Write the file of a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--top", type=int, default=4, help="successors of each token")
    parser.add_argument("--most", type=int, default=1 << 20, help="tokens at most")
    given = parser.parse_args()
    model = load(given.model)
    trace = read_trace(trace_path(model), model.config.vocab_size)
    path = FOLDER / f"{model.fingerprint()}.xz"
    path.write_bytes(pack_trace(trace, given.top, given.most))
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
