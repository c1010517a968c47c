#!/usr/bin/env bash
# Sourced by tpu_vm.sh and queued_resource.sh: the TPU VMs of one run, and what is done on them.
flags="name project zone type version bucket slices poll"
# shellcheck disable=SC2034  # read in shell.sh
switches="spot"
name=unigrpo project="" zone="" type="" version="" bucket="" slices=1 verb=""
# shellcheck disable=SC2034  # read by those who source this
spot="" poll=60
# shellcheck source=launch/shell.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

check_place() {
  require project "the Google Cloud project that pays"
  require zone "where the TPUs are, for example --zone=us-east5-a"
  [[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices is no number of slices; give 1 or more"
  bucket=${bucket#gs://}
}

check_type() {
  require type "the accelerator, for example --type=v5p-128 (64 chips, 16 hosts)"
  if [[ -n $version ]]; then return; fi
  case $type in
    v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) die "--type=$type is of no known generation; give its software as --version=..." ;;
  esac
}

check_run() {
  check_training
  case " ${rest[*]} " in
    *" --workdir=gs://"*) ;;
    *" --workdir=bucket/"*) require bucket "every host mounts it, and the run lies in it" ;;
    *) die "--workdir lies on the host's own disk, which goes with the host; give --workdir=gs://..." ;;
  esac
}

mounting() { echo "${bucket:+ --bucket=$bucket}"; }

# The VMs by name: one a slice.
nodes() {
  if ((slices == 1)); then echo "$name"; return; fi
  local i
  for ((i = 0; i < slices; i++)); do echo "$name-$i"; done
}

# tpus GROUP VERB NAME ...: one command of gcloud.
tpus() { do_ gcloud compute tpus "$@" "--project=$project" "--zone=$zone"; }

# on WORKER COMMAND: on that host of every slice, or on "all".
on() {
  local node
  for node in $(nodes); do
    tpus tpu-vm ssh "$node" "--worker=$1" "--command=$2" || return
  done
}

# The commit at HEAD of this clone goes to every host; the hosts compare it before they train.
install_all() {
  local bundle node
  cd "$root" || return
  bundle=${TMPDIR:-/tmp}/unigrpo.bundle
  do_ git bundle create "$bundle" HEAD || return
  for node in $(nodes); do
    tpus tpu-vm scp "$bundle" "$node:unigrpo.bundle" --worker=all || return
  done
  on all "git init -q unigrpo_jax && cd unigrpo_jax && git fetch -q ../unigrpo.bundle HEAD \
&& git checkout -q -f --detach FETCH_HEAD && bash launch/host.sh install$(mounting)"
}

start_all() {
  on all "cd unigrpo_jax && bash launch/host.sh start$(mounting) -- $(quoted "${rest[@]}")"
}
stop_all() { on all "cd unigrpo_jax && bash launch/host.sh stop"; }
