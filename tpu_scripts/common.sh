# shellcheck shell=bash
# What the scripts beside this one share: options, settings, gcloud, packing, and what to ask a worker.

die() { # MESSAGE [CODE]
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit "${2:-2}"
}

DRY_RUN=
while [[ ${1:-} == -* ]]; do
  case $1 in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
    --dry-run) DRY_RUN=1 ;;
    *) die "there is no option $1 here (those of dar-jax come after the experiment); see --help" ;;
  esac
  shift
done
for setting in PROJECT ZONE NAME; do
  [[ -n ${!setting:-} ]] || die "$setting is not set: export PROJECT=my-project ZONE=us-east5-b NAME=dar, with your values"
done
[[ -n $DRY_RUN ]] || command -v gcloud >/dev/null || die "gcloud is not installed: https://cloud.google.com/sdk/docs/install"

say() { echo "$(date '+%F %T') $NAME: $1"; }

run() { # COMMAND...: runs it, or prints it as a shell would take it
  if [[ -n $DRY_RUN ]]; then printf '%q ' "$@" && echo; else "$@"; fi
}

tpus() { run gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet; }

on_workers() { # all|NUMBER FUNCTION [ARGUMENT...]: calls a function of this shell there
  tpus tpu-vm ssh "$NAME" --worker="$1" --command="$(declare -f "$2"); $(printf '%q ' "${@:2}")"
}

slice_state() { # READY, NONE, or else: the state of the queued resource, or of its node as soon as there is one
  local state
  state=$(tpus queued-resources list --filter="name~/$NAME\$" --format='value(state.state)') || return
  if [[ $state == ACTIVE ]]; then state=$(tpus tpu-vm describe "$NAME" --format='value(state)') || return; fi
  echo "${state:-NONE}"
}

run_state() { # ARGUMENT...: on a worker: running, ended CODE, stopped without a code, or none with these arguments
  cd ~/dar_jax_run 2>/dev/null || { echo none && return; }
  if ! flock --nonblock lock true; then
    echo running
  elif [[ $(cat arguments) != "$(printf '%q ' "$@")" ]]; then
    echo none
  elif [[ -s exit ]]; then
    echo "ended $(cat exit)"
  else
    echo stopped
  fi
}

pack() { # FILE: writes an archive of this working tree's files that git does not ignore
  mkdir -p "$(dirname "$1")" && cd "$(dirname "$0")/.." || return
  git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done | tar --null -czf "$1" -T -
}
