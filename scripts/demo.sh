#!/usr/bin/env bash
# Installs Paceline and lets the embedded model tell a story, then proves that nothing changed.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
install

paceline generate "Once upon a time there was" --max-new-tokens 160 --seed 1 --budget 16 \
  --sampler "temperature=0.5,repetition_penalty=1.1" --check
