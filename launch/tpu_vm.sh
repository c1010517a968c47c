#!/usr/bin/env bash
# Trains on a TPU VM, on all of its hosts at once. Needs gcloud, logged in, on this machine.
#
#   bash launch/tpu_vm.sh create  --project=P --zone=Z --type=v5p-128 [--spot]
#   bash launch/tpu_vm.sh install --project=P --zone=Z
#   bash launch/tpu_vm.sh run     --project=P --zone=Z -- --config=configs/unigrpo.py \
#     --config.init_from=gs://my-bucket/sft --config.prompts.source=gs://my-bucket/prompts.jsonl \
#     --config.eval.source=gs://my-bucket/held_out.jsonl --workdir=gs://my-bucket/runs/a \
#     --config.rewards="{'my_rewards:redness': 1.0}"
#   bash launch/tpu_vm.sh logs    --project=P --zone=Z      follows those of the first host
#   bash launch/tpu_vm.sh stop    --project=P --zone=Z      the run saves itself and ends
#   bash launch/tpu_vm.sh delete  --project=P --zone=Z
#
# --name     of the VM, unigrpo unless given
# --type     accelerator type: v5p-128 has 64 chips (two cores a chip are counted), v6e-64 has 64;
#            --version its software, chosen by the type unless given
# --bucket   for what must be files: with a hierarchical namespace; every host mounts it as bucket/
#            with gcsfuse. The program itself reads and writes gs://, which needs none
# --slices   VMs of a run made by queued_resource.sh, 1 unless given
# --spot     cheaper, and may be taken away; queued_resource.sh takes a new one and goes on
# --dry-run  prints the commands
#
# What follows -- goes to `python -m unigrpo_jax.train`. `install` copies the commit at HEAD to every
# host: commit the module of your reward, at the top of the clone, first. The same `run` again
# continues from the newest checkpoint; where the run is still going it changes nothing.
set -euo pipefail
# shellcheck source=launch/gcloud.sh
source "$(dirname "$0")/gcloud.sh"
parse "$@"
take_verb create install run logs stop delete
check_place

case $verb in
  create)
    check_type
    ((slices == 1)) || die "--slices=$slices: launch/queued_resource.sh makes several slices"
    extra=()
    if [[ -n $spot ]]; then extra=(--spot); fi
    tpus tpu-vm create "$name" "--accelerator-type=$type" "--version=$version" "${extra[@]}" ;;
  install) install_all ;;
  run) check_run; start_all ;;
  logs) tpus tpu-vm ssh "$(nodes | head -n 1)" --worker=0 "--command=tail -n 100 -F unigrpo.log" ;;
  stop) stop_all ;;
  delete)
    left=0  # What one refuses is no reason to keep, and pay for, the others.
    for node in $(nodes); do tpus tpu-vm delete "$node" --quiet || left=$?; done
    exit "$left" ;;
esac
