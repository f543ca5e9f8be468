#!/usr/bin/env bash
# Everything that must hold before a change lands: lint, types, tests. Ends with pytest's summary.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
install "[test]"

ruff format --check .
ruff check .
mypy --strict src
python -m pytest -q --hypothesis-profile repeatable "$@"
