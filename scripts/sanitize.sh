#!/usr/bin/env bash
# Builds the native module with address and undefined-behaviour checks, apart from the usual one, and
# runs the tests of its arguments under them. Needs a C++ compiler with sanitizers, as gcc's.
#   scripts/sanitize.sh [PYTEST ARGUMENTS]   e.g. tests/engines/test_native.py
#   scripts/sanitize.sh scripts/fuzz_gguf.py --native --mutations 20000   runs that script instead
set -euo pipefail
if [[ "${1:-}" == --help ]]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
  exit 0
fi
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"
build=build/sanitize
mkdir -p $build

cmake -S . -B $build -DPACELINE_SANITIZE=ON -DPython_EXECUTABLE="$(command -v python)" > $build/log
cmake --build $build --parallel 2 > $build/log || { tail -n 40 $build/log; exit 1; }
mkdir -p $build/site
rm -rf $build/site/paceline
cp -r src/paceline $build/site/
rm -f $build/site/paceline/_native*.so
cp $build/_native*.so $build/site/paceline/

library() { "${CXX:-g++}" -print-file-name="$1"; }
export PYTHONPATH="$PWD/$build/site"
# The interpreter itself keeps what it allocates until it ends: leaks are not looked for. An
# allocation that no memory can hold is an exception, as without the checks.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:abort_on_error=0
export UBSAN_OPTIONS=print_stacktrace=1
export PYTHONMALLOC=malloc  # so that objects of Python are checked, too
# Chat templates render in a process whose memory is limited below what the checks reserve.
[ $# -gt 0 ] || set -- tests/test_native_arguments.py tests/models/test_config.py \
  tests/test_noise.py tests/drafters/test_draw_model.py tests/models/test_gguf_mutants.py \
  tests/models/test_gguf_tokenizer.py -k "not chat_begins and not template"
[[ "$1" == scripts/*.py ]] || set -- -m pytest -q --hypothesis-profile repeatable "$@"
LD_PRELOAD="$(library libasan.so) $(library libubsan.so) $(library libstdc++.so)" python "$@"
