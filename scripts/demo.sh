#!/usr/bin/env bash
# Installs Paceline and lets the embedded model tell a story, then proves that nothing changed.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
install

paceline generate "Once upon a time there was" --max-new-tokens 200 --check
