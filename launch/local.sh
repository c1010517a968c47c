#!/usr/bin/env bash
# Sets up .venv and shows the program at work on this machine: draws, with reasoning first, from the
# tiny checkpoint of the tests. Its weights are random, so its picture is noise.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "$0")/venv.sh"
out=${OUT:-out}
mkdir -p "$out"
echo "== python -m unigrpo_jax.generate, two prompts in one batch, into $out/"
printf 'a red kite\ntwo birds above a chair\n' > "$out/prompts.txt"
.venv/bin/python -m unigrpo_jax.generate --checkpoint=tests/golden --prompts_file="$out/prompts.txt" \
  --think --max_tokens=32 --out="$out/images" "$@"
