#!/usr/bin/env bash
# usage: bash scripts/demo.sh
#
# Installs Paceline into .venv and lets the embedded model tell a story; then proves that plain
# decoding gives the same text.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
help_of "$0" "${1:-}"
install

paceline generate "Once upon a time there was" --max-new-tokens 160 --seed 1 --budget 16 \
  --sampler "temperature=0.5,repetition_penalty=1.1" --check
