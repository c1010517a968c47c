#!/usr/bin/env bash
# What one host of a pod does. The other scripts run it on every host; nothing needs it by hand.
#
#   bash launch/host.sh install [--backend=tpu] [--bucket=NAME]
#   bash launch/host.sh run [--backend=tpu] [--bucket=NAME] -- --config=... --workdir=gs://...
#   bash launch/host.sh start ...     as run, in the background; adds to ~/unigrpo.log
#   bash launch/host.sh status        running, "ended STATUS", or none
#   bash launch/host.sh stop          SIGTERM, which saves; waits for the end
#
# --backend  tpu or gpu: its requirements, unless REQUIREMENTS names others, and its flags
#            (launch/env.sh)
# --bucket   of Cloud Storage, with a hierarchical namespace; gcsfuse mounts it as bucket/. Paths of
#            gs:// need no mount
# --dry-run  prints the commands
#
# Every status but 0, finished, and 2, bad input, means that the same command goes on: 1 after what
# trying again may cure, such as a reward's server that was away too long; 75 after a signal, which
# for the training itself is a good end.
set -euo pipefail
flags="backend bucket"
backend=tpu bucket="" verb=""
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/shell.sh
source "$here/shell.sh"
parse "$@"
take_verb install run start status stop
cd "$here/.."
log=$HOME/unigrpo.log pid_file=$HOME/unigrpo.pid status_file=$HOME/unigrpo.status
[[ $backend == tpu || $backend == gpu ]] || die "--backend=$backend is neither tpu nor gpu"

running() { [[ -f $pid_file ]] && kill -0 "$(cat "$pid_file")" 2>/dev/null; }

mount_bucket() {
  [[ -n $bucket ]] || return 0
  if mountpoint -q bucket; then return 0; fi
  command -v gcsfuse > /dev/null || install_gcsfuse
  do_ mkdir -p bucket
  # Of all files, what another host wrote is seen at once: on a TPU host gcsfuse would remember for
  # ever what it once saw. A limit of 0 refuses to rename a folder file by file, which would leave
  # half a checkpoint where it is interrupted; a hierarchical namespace renames it whole.
  do_ gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    --rename-dir-limit=0 "$bucket" bucket
}

install_gcsfuse() {
  local deb=gcsfuse_3.2.0_amd64.deb
  do_ curl -fsSL -o "/tmp/$deb" \
    "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v3.2.0/$deb"
  apt fuse "/tmp/$deb"
}

# A fresh machine has old lists, and may still be updating itself.
apt() {
  for _ in {1..40}; do do_ sudo apt-get update -q && break; sleep 15; done
  do_ sudo apt-get install -y -q -o DPkg::Lock::Timeout=600 "$@"
}

install() {
  # That of a TPU VM may be too old. Of another, or of PYTHON, launch/venv.sh says so.
  local recent='import sys; sys.exit(sys.version_info < (3, 11))'
  if [[ $backend == tpu && -z ${PYTHON:-} ]] && ! python3 -c "$recent"; then
    apt python3.11 python3.11-venv
    export PYTHON=python3.11
  fi
  export REQUIREMENTS=${REQUIREMENTS:-requirements-$backend.txt}
  echo "+ REQUIREMENTS=$REQUIREMENTS source launch/venv.sh"
  # shellcheck source=launch/venv.sh
  [[ -n $dry_run ]] || source launch/venv.sh
}

# Trains in the foreground. A signal goes on to the program, and bash, woken by it, waits again.
train() {
  local command=(.venv/bin/python -m unigrpo_jax.train "${rest[@]}")
  local folder child teller status=0 signalled=""
  # shellcheck source=launch/env.sh
  source launch/env.sh "$backend"
  # A host that takes over after a preemption finds what was compiled before.
  if [[ -n $bucket ]]; then export JAX_COMPILATION_CACHE_DIR=$PWD/bucket/compiled; fi
  if [[ -n $dry_run ]]; then do_ "${command[@]}"; return; fi
  echo "+ $(quoted "${command[@]}")"
  folder=$(mktemp -d)
  mkfifo "$folder/pipe"
  # Where a signal is for all processes, whoever tells of the end must outlive it.
  (trap '' TERM INT; exec tee "$folder/output" < "$folder/pipe") &
  teller=$!
  "${command[@]}" > "$folder/pipe" 2>&1 &
  child=$!
  trap 'signalled=1; kill -TERM "$child" 2>/dev/null || true' TERM INT
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do status=0; wait "$child" || status=$?; done
  wait "$teller" || true
  # The program ends well when it has saved itself; to whoever waits for the run it is not finished.
  # A signal may have come to another host.
  if grep -q '^stopped by a signal' "$folder/output"; then signalled=1; fi
  if [[ $status == 0 && -n $signalled ]]; then status=75; fi
  rm -r "$folder"
  echo "== ended with status $status"
  return "$status"
}

start() {
  if running; then echo "already running; launch/host.sh stop ends it"; return; fi
  rm -f "$status_file"
  local again=(bash launch/host.sh run "--backend=$backend")
  if [[ -n $bucket ]]; then again+=("--bucket=$bucket"); fi
  echo "+ $(quoted "${again[@]}" -- "${rest[@]}") >> $log"
  if [[ -n $dry_run ]]; then return; fi
  # Added to it: it says why the run before this one broke.
  STATUS_FILE=$status_file setsid nohup "${again[@]}" -- "${rest[@]}" >> "$log" 2>&1 < /dev/null &
  echo $! > "$pid_file"
}

# Where a signal ends bash before the training does, the status is of the command before: often 0.
write_status() {
  local status=$1
  if [[ $status == 0 && -z $trained ]]; then status=143; fi
  echo "$status" > "$STATUS_FILE"
}

trained=""
case $verb in
  install) mount_bucket; install ;;
  run)
    # Of a run in the background: written whatever ends it.
    if [[ -n ${STATUS_FILE:-} ]]; then trap 'write_status $?' EXIT; fi
    check_training; mount_bucket; install; train; trained=1 ;;
  start) check_training; start ;;
  status)
    if running; then echo running
    elif [[ -f $status_file ]]; then echo "ended $(cat "$status_file")"
    else echo none; fi ;;
  stop)
    if ! running; then echo "nothing runs here"; exit; fi
    pid=$(cat "$pid_file")
    do_ kill -TERM "$pid"
    [[ -n $dry_run ]] || timeout 900 tail --pid="$pid" -f /dev/null ;;
esac
