#!/usr/bin/env bash
# Sourced by the scripts beside it: flags, one-line errors, and commands that are printed before
# they run, or instead of it. A script says what it takes in `flags` (with a value) and `switches`.
# shellcheck disable=SC2034  # What is set here is read there.
switches="dry_run help ${switches:-}"
dry_run="" help="" words=() rest=()

die() {
  echo "error: $1" >&2
  exit 2
}

# The comment at the head of the script, which is its help.
usage() { sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0"; }

# Flags become variables of their names, other words go to `words`, what follows -- to `rest`.
parse() {
  local key
  while (($#)); do
    key=${1%%=*} key=${key#--} key=${key//-/_}
    case $1 in
      --) shift; rest=("$@"); break ;;
      --*=*)
        [[ " ${flags:-} " == *" $key "* ]] || die "$1 is no flag of this script; --help shows them"
        [[ -n ${1#*=} ]] || die "${1%%=*} is empty; give it a value"
        printf -v "$key" %s "${1#*=}" ;;
      --*)
        [[ " ${flags:-} " != *" $key "* ]] || die "$1 has no value; give it as $1=VALUE"
        [[ " $switches " == *" $key "* ]] || die "$1 is no flag of this script; --help shows them"
        printf -v "$key" 1 ;;
      *) words+=("$1") ;;
    esac
    shift
  done
  if [[ -n $help ]]; then usage; exit 0; fi
}

# require NAME HINT: the flag --NAME was given.
require() {
  [[ -n ${!1} ]] || die "--${1//_/-} is missing; $2"
}

# take_verb A B ...: the one word that was given, which must be one of these, becomes `verb`.
take_verb() {
  [[ ${#words[@]} == 1 ]] || die "give one of: $*; got '${words[*]}'"
  [[ " $* " == *" ${words[0]} "* ]] || die "'${words[0]}' is none of: $*"
  verb=${words[0]}
}

# The arguments of the training, after --.
check_training() {
  local all=" ${rest[*]} "
  [[ $all == *" --config="* ]] || die "--config is missing; give the training's flags after --"
  [[ $all == *" --workdir="* ]] || die "--workdir is missing; give the training's flags after --"
}

# The words of a command as a shell reads them, quoted only where it must be.
quoted() {
  local word line=""
  for word; do
    if [[ $word =~ ^[a-zA-Z0-9_@%+=:,./-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  echo "${line:1}"
}

# Prints a command, and runs it unless this is a dry run.
do_() {
  echo "+ $(quoted "$@")"
  [[ -n $dry_run ]] || "$@"
}
