#!/usr/bin/env bash
# Train the family on one GPU, in commands of under ten minutes each; README.md says in which order.
#   SHARED  folder with text/, data/gsm8k and data/mbpp
#   OUT     where finished models appear, as parts of 15 MiB of a tar file, four at a time
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1
shared=${SHARED:-../shared} out=${OUT:-build/out} work=build/reference
mkdir -p "$out" "$work"

module() { python3 -m "benchmarks.reference_models.$1" "${@:2}"; }

prepare() {
  nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
  module pack --work "$work" --shared "$shared"
  [ -e "$work/attention" ] && return
  if module check; then echo blocks >"$work/attention"; else echo dense >"$work/attention"; fi
}

train() { # MODEL MINUTES, MOST MINUTES OF THIS COMMAND
  module train "$1" --work "$work" --minutes "$2" --stop-after "$3" \
    --attention "$(cat "$work/attention")"
  rm -f "$work/$1.tar."*
  tar -C "$work/$1" -cf - export | split -b 15M -d -a 2 - "$work/$1.tar."
}

give() { # MODEL [FIRST PART]
  local parts=("$work/$1.tar."*)
  [ "${2:-0}" -lt "${#parts[@]}" ] || { echo "$1 has ${#parts[@]} parts" >&2; exit 2; }
  cp "${parts[@]:${2:-0}:4}" "$out"
  echo "gave parts ${2:-0} and up of ${#parts[@]}:"
  (cd "$out" && sha256sum "$1".tar.*)
}

case ${1:-} in
  first) prepare; train 5m 2.5 3; train 30m 4.2 4.6; give 30m ;;
  second) train 110m 8.6 9.2; give 110m ;;
  give) give "$2" "$3" ;;
  last) give 110m 12; give 5m ;;
  spare) train 19m 3 4; give 19m ;;
  *) echo "usage: gpu.sh first | second | give MODEL PART | last | spare" >&2; exit 2 ;;
esac
