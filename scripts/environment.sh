# Sourced by the scripts beside it: a virtual environment in .venv, with everything pinned.
# install EXTRAS   e.g. `install` for the default package, `install "[test]"` for all that CI needs

install() {
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  [ -x .venv/bin/python ] || python3 -m venv .venv
  export PIP_CONSTRAINT="$PWD/constraints.txt" PIP_DISABLE_PIP_VERSION_CHECK=1
  case "${1:-}" in
    # By its exact version: anything looser may bring gigabytes of CUDA.
    *test*) .venv/bin/python -m pip install --quiet torch==2.13.0 ;;
  esac
  .venv/bin/python -m pip install --quiet ".${1:-}"
  export PATH="$PWD/.venv/bin:$PATH"
}
