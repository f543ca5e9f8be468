#!/usr/bin/env bash
# usage: bash benchmarks/gpu.sh split FILE... FOLDER   here: cuts weights into pieces of 60 MB
#        bash benchmarks/gpu.sh join FOLDER OUT        there: joins them, by their sums
#        bash benchmarks/gpu.sh run MODEL... [OPTIONS] there: measures, in less than ten minutes
#        bash benchmarks/gpu.sh heads MODEL... [OPTIONS] there: trains heads, in nine minutes
#
# One run on a GPU, without a network: passes over trees as CUDA graphs, Spec-Bench with drafters
# against plain decoding and a compiled loop, and proofs; see benchmarks/gpu/run.py for the options,
# and benchmarks/gpu/train_heads.py for those of `heads`.
# Needs a Python with torch for CUDA, and this checkout, with its native module in src/paceline or
# installed. `run MODEL --device cpu --smoke` tries all parts in seconds without a GPU.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
case "${1:-}" in
  split | join)
    exec python3 "$root/benchmarks/gpu/pieces.py" "$@"
    ;;
  run | heads)
    script=run
    [ "$1" = run ] || script=train_heads
    shift
    for module in "$root"/src/paceline/_native*.so; do
      [ ! -e "$module" ] || export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
    done
    for package in torch paceline; do
      python3 -c "import $package" 2> /dev/null || {
        echo "python3 cannot import $package; install it there, or put a Python that can in front of PATH" >&2
        exit 2
      }
    done
    exec python3 "$root/benchmarks/gpu/$script.py" "$@"
    ;;
  *)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    [[ "${1:-}" =~ ^(-h|--help)$ ]] || exit 2
    ;;
esac
