#!/usr/bin/env bash
# Sourced by the scripts beside it: goes to the repository's root, makes .venv, or the folder VENV, and
# installs into it: requirements.txt, or the file REQUIREMENTS, with a Python of 3.11 or OLDEST. What
# NAME.txt needs in order to be built is in NAME-first.txt, where there is one.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python3}
oldest=${OLDEST:-3.11}
if ! "$python" -c "" 2>/dev/null; then
  echo "error: $python does not run; set PYTHON to a Python of at least $oldest" >&2
  exit 2
fi
if ! "$python" -c "import sys; sys.exit(sys.version_info < (${oldest/./, }))"; then
  echo "error: $("$python" --version) is too old; set PYTHON to a Python of at least $oldest" >&2
  exit 2
fi
venv=${VENV:-.venv}
if [ -n "${PYTHON:-}" ] && [ -x "$venv/bin/python" ]; then
  version='import sys; print("%d.%d" % sys.version_info[:2])'
  has=$("$venv/bin/python" -c "$version") wanted=$("$python" -c "$version")
  if [ "$has" != "$wanted" ]; then
    echo "error: $venv has Python $has, PYTHON=$PYTHON is $wanted; remove $venv or unset PYTHON" >&2
    exit 2
  fi
fi
requirements=${REQUIREMENTS:-requirements.txt}
if [ ! -f "$requirements" ]; then
  echo "error: REQUIREMENTS=$requirements is no file of this folder; give one, or unset it" >&2
  exit 2
fi
stamp=$venv/installed-$(cat "$requirements" requirements.txt | sha256sum | cut -c 1-16)
if [ ! -f "$stamp" ]; then
  echo "== installing $requirements into $venv"
  "$python" -m venv "$venv"
  install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
  first=${requirements%.txt}-first.txt
  if [ -f "$first" ]; then
    "${install[@]}" -r "$first"
    install+=(--no-build-isolation)
  fi
  "${install[@]}" -r "$requirements"
  touch "$stamp"
fi
