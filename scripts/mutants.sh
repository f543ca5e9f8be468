#!/usr/bin/env bash
# Mutation check of the pure core: a seeded sample of one-token changes, and which of them no test
# notices. Takes about 10 seconds a mutant, so it is no part of scripts/test.sh.
#
#     bash scripts/mutants.sh [--count 10] [--seed 0] [--only governor]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
install "[test,mutation]"

exec nice -n 15 python scripts/mutants.py "$@"
