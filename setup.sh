#!/usr/bin/env bash
# Make .venv from a complete lock: ./setup.sh [cpu|gpu]. Without an argument: what .venv already is, else cpu.
# Does nothing when .venv is up to date. Honours PYTHON (an interpreter) and pip's own settings and variables.
# A stamp is written after the step that it stands for, so an interrupted set-up starts again.
set -euo pipefail
cd "$(dirname "$0")"

fail() { printf 'setup: %s\n' "$1" >&2; exit 1; }

flavour=${1:-$(cat .venv/flavour 2>/dev/null || echo cpu)}
case $flavour in
  cpu) needed_gb=4 ;;
  gpu) needed_gb=16 ;;
  *) fail "found '$flavour', expected cpu or gpu: run ./setup.sh cpu or ./setup.sh gpu." ;;
esac
lock=requirements-$flavour.lock
# The folder is in the key because a venv holds absolute paths and does not survive a move.
packages_key=$( (pwd; cat "$lock") | sha256sum | cut -c1-64)
project_key=$(sha256sum < pyproject.toml | cut -c1-64)

have() { [ "$(cat ".venv/$1" 2>/dev/null)" = "$2" ]; }
up_to_date() { have packages.stamp "$packages_key" && have project.stamp "$project_key"; }

find_python() {
  local candidate version found=
  for candidate in ${PYTHON:-python3.11 python3}; do
    version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    if [ "$version" = 3.11 ]; then python=$candidate; return; fi
    found="${found:+$found, }$candidate is $version"
  done
  fail "Python 3.11 is needed (found: ${found:-none}): install it, or name it with PYTHON=/path/to/python3.11."
}

check_machine() {
  [ "$(uname -sm)" = "Linux x86_64" ] ||
    fail "the locks are for Linux on x86-64 and this is $(uname -sm): use such a machine or docker/."
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make virtual environments: install its venv module (Debian and Ubuntu: python3.11-venv)."
  # Triton compiles its kernels at run time; on CPU the recipes run without a compiler.
  [ "$flavour" = cpu ] || command -v gcc >/dev/null ||
    fail "no gcc was found, and Triton compiles GPU kernels with it at run time: install one (Debian and Ubuntu: gcc)."
  local free_kb
  free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
  [ "$free_kb" -ge $((needed_gb * 1024 * 1024)) ] ||
    fail "$((free_kb / 1024 / 1024)) GB of disk are free in $PWD and the $flavour packages need $needed_gb GB: free some space."
}

explain_pip_failure() {
  if grep -q 'No space left' "$log"; then
    fail "the disk filled up while installing; about $needed_gb GB are needed in $PWD and in ${TMPDIR:-/tmp}."
  elif grep -q 'No matching distribution found for torch==.*+cpu' "$log"; then
    fail "the package index has no CPU build of PyTorch: set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index, which its install page names."
  elif grep -qE 'Connection|Temporary failure|timed out|Max retries|from versions: none' "$log"; then
    fail "pip could not reach its package index: check the network, or point PIP_INDEX_URL at a mirror (pip's words: $log)."
  fi
  fail "pip failed with '$(grep -E '^ *(ERROR|error)' "$log" | head -n 1)': see $log."
}

pip_install() {
  # --no-compile: byte code is written at first import instead, which halves the time here.
  .venv/bin/python -m pip install --quiet --no-input --disable-pip-version-check --no-deps --no-compile "$@" \
    >>"$log" 2>&1 || explain_pip_failure
}

install_packages() {
  find_python
  check_machine
  echo "setup: installing the $flavour packages into .venv (once; about a minute after the downloads)"
  rm -rf .venv
  "$python" -m venv .venv >"$log" 2>&1 || fail "$python could not make .venv: see $log."
  echo "$flavour" > .venv/flavour
  pip_install -r "$lock"
  echo "$packages_key" > .venv/packages.stamp
}

up_to_date && exit 0
if command -v flock >/dev/null; then exec 9<. && flock 9; fi  # two set-ups at once would mix their files
up_to_date && exit 0
log=.setup.log
: > "$log"
have packages.stamp "$packages_key" || install_packages
# editable_mode=compat puts this folder itself on the path, so that a new package needs no new set-up.
pip_install --no-build-isolation --config-settings editable_mode=compat -e .
echo "$project_key" > .venv/project.stamp
rm -f "$log"
