#!/usr/bin/env bash
# Makes or refreshes .venv: tools/venv.sh [EXTRA...], e.g. `tools/venv.sh test dev`.
#
# Installs only when Python, pyproject.toml or the wanted extras changed since the last success (.venv/.stamps/), so a
# second run needs no network. PYTHON=... names the interpreter; without it an existing .venv is kept as it is, else the
# newest CPython >= 3.11 that runs is taken from PATH and from pyenv's versions.
set -euo pipefail

readonly venv=.venv
readonly attempts=3

say() { printf '== %s\n' "$*" >&2; }

# Prints "MAJOR.MINOR.PATCH" if $1 is an interpreter that we can use; a pyenv shim without a version fails here.
version_of() {
  "$1" - 2>/dev/null <<'PY'
import sys, sysconfig
ok = (
    sys.implementation.name == "cpython"
    and (3, 11) <= sys.version_info[:2] <= (3, 14)
    and sys.version_info.releaselevel == "final"
    and not sysconfig.get_config_var("Py_GIL_DISABLED")
)
if not ok:
    sys.exit(1)
print("{}.{}.{}".format(*sys.version_info))
PY
}

# Debian ships Python without ensurepip; such an interpreter cannot make a virtual environment with pip in it.
has_ensurepip() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

# Prints the newest usable interpreter.
find_python() {
  local candidate version best= best_version=0 without_pip=
  for candidate in python3.14 python3.13 python3.12 python3.11 python3 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python; do
    version=$(version_of "$candidate") || continue
    if ! has_ensurepip "$candidate"; then
      without_pip="$candidate ($version)"
      continue
    fi
    if [ "$(printf '%s\n%s\n' "$best_version" "$version" | sort -V | tail -n 1)" != "$best_version" ]; then
      best=$candidate best_version=$version
    fi
  done
  if [ -n "$best" ]; then
    echo "$best"
  elif [ -n "$without_pip" ]; then
    say "$without_pip has no ensurepip, so it cannot make a virtual environment."
    say "On Debian and Ubuntu: sudo apt-get install python3-venv. Or name another interpreter: make PYTHON=/path/to/python"
    return 1
  else
    say "No CPython 3.11 to 3.14 found. Install one, or name it: make PYTHON=/path/to/python"
    return 1
  fi
}

make_venv() {
  local python=${PYTHON:-} version
  if [ -z "$python" ] && [ -x $venv/bin/python ] && version_of $venv/bin/python >/dev/null; then
    return
  fi
  [ -n "$python" ] || python=$(find_python)
  if ! version=$(version_of "$python"); then
    say "$python is not a CPython 3.11 to 3.14 that runs"
    return 1
  fi
  if ! has_ensurepip "$python"; then
    say "$python has no ensurepip, so it cannot make a virtual environment (Debian: apt-get install python3-venv)"
    return 1
  fi
  if [ -x $venv/bin/python ] && [ "$(version_of $venv/bin/python)" = "$version" ]; then
    return
  fi
  say "making $venv with Python $version ($python)"
  rm -rf $venv
  "$python" -m venv $venv
}

# pip with patience: a large download over a slow line times out and is worth asking for again.
pip_install() {
  local quiet=() i
  [ -t 2 ] || quiet=(--quiet)
  for ((i = 1; i <= attempts; i++)); do
    if PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_RETRIES="${PIP_RETRIES:-8}" PIP_DEFAULT_TIMEOUT="${PIP_DEFAULT_TIMEOUT:-60}" \
      $venv/bin/python -m pip install ${quiet[@]+"${quiet[@]}"} "$@"; then
      return
    fi
    say "pip failed (attempt $i of $attempts)"
    ((i == attempts)) || sleep $((5 * i))
  done
  return 1
}

install() { # NAME REQUIREMENT
  local stamp=$venv/.stamps/$1 key
  key=$({ $venv/bin/python -V; pwd; cat pyproject.toml; } | sha256sum)
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then
    return
  fi
  case $1 in
    base) say "installing jengine and what it needs (about 400 MB to download the first time)" ;;
    test) say "installing what the tests need; without a CPU build of torch at hand pip takes PyPI's, about 3 GB" ;;
    *) say "installing the extra '$1'" ;;
  esac
  # Without build isolation, so that a change of pyproject.toml alone asks the network for nothing.
  $venv/bin/python -c 'import setuptools as s; exit(int(s.__version__.split(".")[0]) < 77)' 2>/dev/null ||
    pip_install 'setuptools>=77'
  pip_install --no-build-isolation -e "$2"
  mkdir -p $venv/.stamps
  printf '%s' "$key" >"$stamp"
}

main() {
  cd "$(dirname "$0")/.."
  make_venv
  install base .
  local extra
  for extra in "$@"; do
    install "$extra" ".[$extra]"
  done
}

# Sourced by tests/test_tools.py, which calls the functions one by one.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  main "$@"
fi
