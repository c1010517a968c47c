#!/usr/bin/env bash
# Serves a reward of zoo/ on this machine, from an environment of its own, .venv-NAME, which it makes.
#
#   launch/rewards.sh NAME [--port=8901] [-- ARGUMENTS of unigrpo_jax.rewards.serve]
#   launch/rewards.sh pickscore -- --reward_options='{"pickscore": {"weights": "FOLDER"}}'
#   launch/rewards.sh NAME --selftest [-- FOLDER ...]   pickscore, clip and aesthetic on small CLIPs
#
# NAME: pickscore, clip, aesthetic, hpsv2, hpsv3, imagereward, deqa, geneval, geneval-transformers;
# see zoo/README.md. It listens on this machine alone; for others give -- --host=0.0.0.0 and
# --token_env. PYTHON chooses the Python; --dry-run prints the commands.
set -euo pipefail
flags="port"
switches="selftest" port=8901 selftest=""
# shellcheck source=launch/shell.sh
source "$(dirname "$0")/shell.sh"
parse "$@"
[[ ${#words[@]} == 1 ]] || die "give the NAME of one reward; --help lists them"
name=${words[0]}
case $name in
  pickscore) class=pickscore:PickScore ;;
  clip) class=clip:ClipScore ;;
  aesthetic) class=aesthetic:Aesthetic ;;
  hpsv2) class=hpsv2:HPSv2 ;;
  hpsv3) class=hpsv3:HPSv3 ;;
  imagereward) class=imagereward:ImageReward ;;
  deqa) class=deqa:DeQA ;;
  geneval | geneval-transformers) class=geneval:GenEval ;;
  *) die "NAME=$name is no reward of zoo/; --help lists them" ;;
esac
[[ $port =~ ^[0-9]+$ ]] || die "--port=$port is no number"
command=(-m unigrpo_jax.rewards.serve --rewards "${name%%-*}=zoo.$class" "--port=$port" "${rest[@]}")
if [[ -n $selftest ]]; then
  [[ $name =~ ^(pickscore|clip|aesthetic)$ ]] || die "--selftest is of pickscore, clip and aesthetic"
  command=(-m zoo.selftest "${rest[@]}")
fi
[[ $name == geneval ]] && export OLDEST=3.10 PYTHON=${PYTHON:-python3.10}  # as mmdet 2.x
export VENV=.venv-$name REQUIREMENTS=zoo/requirements-$name.txt
if [[ -n $dry_run ]]; then
  echo "+ VENV=$VENV REQUIREMENTS=$REQUIREMENTS source launch/venv.sh"
else
  # shellcheck source=launch/venv.sh
  source "$(dirname "$0")/venv.sh"
fi
do_ "$VENV/bin/python" "${command[@]}"
