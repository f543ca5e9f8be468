# Sourced by the scripts beside it: virtual environments, with everything pinned.

# help_of SCRIPT ARGUMENT   prints the comment at the top of a script for --help, and ends it
help_of() {
  case "$2" in
    -h | --help)
      sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$1"
      exit 0
      ;;
  esac
}

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
  case "${1:-}" in
    # Without what its evaluations need, old releases of many packages: tests compare scores only.
    *test*) .venv/bin/python -m pip install --quiet --no-deps kvpress cachetools ;;
  esac
  export PATH="$PWD/.venv/bin:$PATH"
}

# install_browser   after `install "[test]"`: Debian's chromium as root, else Playwright's own
install_browser() {
  local name
  for name in chromium chromium-browser google-chrome; do
    if command -v "$name" > /dev/null; then return; fi
  done
  if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    if apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; then return; fi
  fi > /dev/null
  python -m playwright install --only-shell chromium > /dev/null ||
    echo "no browser could be installed: the playground's tests will fail" >&2
}

# pull_models   after `install "[test]"`: the real models of the tests, unless variables name them
pull_models() {
  [ -n "${PACELINE_TEST_SMOLLM2:-}" ] || paceline pull smollm2-135m > /dev/null
  [ -n "${PACELINE_TEST_GEMMA3:-}" ] || paceline pull gemma3-270m > /dev/null ||
    echo "Gemma 3 270M cannot be fetched: its tests will be skipped" >&2
}

# layer FOLDER   after `install "[test]"`: an environment on top of the packages of .venv
layer() {
  [ -x "$1/bin/python" ] || python3 -m venv "$1"
  local code='import sysconfig; print(sysconfig.get_path("purelib"))'
  .venv/bin/python -c "$code" > "$("$1/bin/python" -c "$code")/paceline-test.pth"
}

# install_clients   clients of the server in .venv-clients (about 120 MB of downloads), by their own
# constraints, and the package `openai` of Node where npm is
install_clients() {
  layer .venv-clients
  local code='import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]'
  code="$code[\"optional-dependencies\"][\"clients\"], sep=\"\\n\")"
  PIP_CONSTRAINT="$PWD/tests/clients/constraints.txt" .venv-clients/bin/python -m pip install \
    --quiet -r <(.venv/bin/python -c "$code")
  if command -v npm > /dev/null; then
    npm ci --prefix tests/clients --silent --no-audit --no-fund
  else
    echo "there is no npm: the tests of Node's client will be skipped" >&2
  fi
}

# install_ray   Ray in .venv-ray
install_ray() {
  layer .venv-ray
  local ray
  ray="$(grep -o 'ray\[[a-z,]*\]==[0-9.]*' pyproject.toml)"
  .venv-ray/bin/python -m pip install --quiet "$ray"
}

# install_harness   lm-evaluation-harness in .venv-harness
install_harness() {
  layer .venv-harness
  local harness
  harness="$(grep -o 'lm-eval\[[a-z,]*\]==[0-9.]*' pyproject.toml)"
  .venv-harness/bin/python -m pip install --quiet "$harness"
}
