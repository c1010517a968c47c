#!/usr/bin/env bash
# Sets up .venv, checks the style and runs the tests. Arguments go to pytest, for example -m slow.
# WORKERS processes share the tests, 2 unless it is set.
set -euo pipefail
REQUIREMENTS="requirements-dev.txt"
# shellcheck source=launch/venv.sh
source "$(dirname "$0")/venv.sh"
echo "== ruff check"
.venv/bin/ruff check unigrpo_jax tests configs zoo
# Compiling allocates and frees much memory: in huge pages that costs fewer page faults. Only glibc
# reads this.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
echo "== pytest"
.venv/bin/python -m pytest -n "${WORKERS:-2}" --dist worksteal "$@"
