#!/usr/bin/env bash
# usage: bash scripts/demo.sh
#
# Installs Paceline into .venv, pulls SmolLM2 135M (98 MB, Apache-2.0) and asks it a question; then
# proves that plain decoding gives the same answer, and says how long that takes. Without a network
# the small story model inside the package stands in.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
help_of "$0" "${1:-}"
install

if paceline pull smollm2-135m > /dev/null; then
  question="Give me three tips for sleeping better."
  printf '\n> %s\n\n' "$question"
  paceline generate "$question" --model smollm2-135m --chat --max-new-tokens 160 --temperature 0 \
    --check
else
  printf '\nSmolLM2 cannot be fetched here; the embedded story model stands in, and tells a story.\n\n'
  paceline generate "Once upon a time there was" --max-new-tokens 160 --seed 1 \
    --sampler "temperature=0.5,repetition_penalty=1.1" --check
fi
