#!/usr/bin/env bash
# Trains on TPU VMs of the queue, and asks for new ones when they are taken away. Needs gcloud, logged
# in, on this machine, where `keep` has to stay alive until the run is finished.
#
#   bash launch/queued_resource.sh keep   --project=P --zone=Z --type=v5p-128 --spot -- \
#     --config=configs/unigrpo.py --config.init_from=gs://my-bucket/sft \
#     --config.prompts.source=gs://my-bucket/prompts.jsonl --workdir=gs://my-bucket/runs/a \
#     --config.eval.source=gs://my-bucket/held_out.jsonl --config.rewards="{'my_rewards:redness': 1.0}"
#   bash launch/queued_resource.sh create --project=P --zone=Z --type=v5p-128 [--spot] [--slices=2]
#   bash launch/queued_resource.sh state  --project=P --zone=Z
#   bash launch/queued_resource.sh delete --project=P --zone=Z
#
# `keep` asks for TPUs, installs, starts the run, looks every --poll=60 seconds, starts again what
# broke, asks again for TPUs that were taken away, and ends when the run is finished (status 0) or was
# refused (status 2). It may be ended and called again at any time: the run does not notice. The TPUs
# stay, and are paid for, until `delete`.
#
# --name     of the request and of its VM, unigrpo unless given; several slices are NAME-0, NAME-1
# --slices   1 unless given; the config then needs --config.mesh.data=SLICES
# --dry-run  prints the commands of one round, from nothing to a started run
#
# --type, --version, --bucket, --spot and what follows -- are as in launch/tpu_vm.sh, whose install,
# run, logs and stop work on these VMs.
set -euo pipefail
# shellcheck source=launch/gcloud.sh
source "$(dirname "$0")/gcloud.sh"
parse "$@"
take_verb keep create state delete
check_place

# Of the request: WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, FAILED ...; NONE without.
state() {
  local found
  if found=$(gcloud compute tpus queued-resources describe "$name" "--project=$project" \
      "--zone=$zone" "--format=value(state.state)" 2>&1); then
    echo "$found"
  elif [[ $found == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo "UNKNOWN $found"  # A failed look must not be taken for a lost request.
  fi
}

# The run on the first host: running, "ended STATUS", none, or nothing where it does not answer.
run_status() {
  local ask="cd unigrpo_jax && bash launch/host.sh status || echo none"
  gcloud compute tpus tpu-vm ssh "$(nodes | head -n 1)" "--project=$project" "--zone=$zone" \
    --worker=0 "--command=$ask" 2> /dev/null | tail -n 1 || true
}

create() {
  check_type
  local which=("--node-id=$name") extra=()
  if ((slices > 1)); then which=("--node-count=$slices" "--node-prefix=$name"); fi
  if [[ -n $spot ]]; then extra=(--spot); fi
  tpus queued-resources create "$name" "${which[@]}" "--accelerator-type=$type" \
    "--runtime-version=$version" "${extra[@]}"
}

delete() { tpus queued-resources delete "$name" --force --quiet; }

begin() { install_all && start_all && begun=1; }

# One look at a request that is ACTIVE. Fails where a host does not obey: it is looked at again.
look() {
  local found
  found=$(run_status)
  echo "run: ${found:-no answer}"
  # How another run ended, before this one began on the same VM, says nothing of this one.
  if [[ -z $begun && $found == ended* ]]; then found=none; fi
  case $found in
    running) begun=1 ;;
    "") ;;
    "ended 0") exit 0 ;;
    "ended 2") die "the run was refused; launch/tpu_vm.sh logs says why" ;;
    none) begin ;;
    *) stop_all || true; begin ;;  # What is left of a broken run would not let it start.
  esac
}

begun=""

keep() {
  check_type
  check_run
  [[ $poll =~ ^[0-9]+$ ]] || die "--poll=$poll is no number of seconds"
  if [[ -n $dry_run ]]; then create; begin; return; fi
  local now
  while true; do
    now=$(state)
    echo "== $(date +%H:%M:%S) $now"
    case $now in
      NONE) create || true ;;
      ACTIVE) look || true ;;
      SUSPENDED | FAILED) delete || true ;;
    esac
    sleep "$poll"
  done
}

case $verb in
  keep) keep ;;
  create)
    found=NONE
    if [[ -z $dry_run ]]; then found=$(state); fi
    if [[ $found == NONE ]]; then create; else echo "not asked for again: $name is $found"; fi ;;
  state) if [[ -n $dry_run ]]; then tpus queued-resources describe "$name"; else state; fi ;;
  delete) delete ;;
esac
