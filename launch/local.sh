#!/usr/bin/env bash
# Sets up .venv and shows the program at work on this machine, on the embedded BAGEL: draws a prompt
# that needs thought, trains UniGRPO on IconWorld, and writes a page about it. OUT names the folder;
# arguments go to the training, for example --config.seed=1.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "$0")/venv.sh"
# shellcheck source=launch/env.sh
source "$(dirname "$0")/env.sh" cpu
out=${OUT:-out}
mkdir -p "$out"
echo "== python -m unigrpo_jax.generate, into $out/kites.png"
.venv/bin/python -m unigrpo_jax.generate --checkpoint=tiny --think --out="$out/kites.png" \
  --upscale=8 --prompt="draw half of four kites in the colour of grass"
echo "== python -m unigrpo_jax.train, in $out/unigrpo"
.venv/bin/python -m unigrpo_jax.train --config=configs/unigrpo.py:tiny --workdir="$out/unigrpo" "$@"
echo "== python -m unigrpo_jax.report"
.venv/bin/python -m unigrpo_jax.report "$out/unigrpo"
