#!/usr/bin/env bash
# Starts training on every worker of the slice, detached: it goes on when the connection ends.
#
# usage: run.sh [--dry-run] EXPERIMENT --workdir gs://BUCKET/FOLDER [OPTIONS OF dar-jax train]
#
# runs `dar-jax train EXPERIMENT ... --resume` in ~/dar_jax: the same command goes on with a run that was interrupted. A worker
# keeps its log, exit code and command in ~/dar_jax_run. Nothing is started as long as a run is going on (stop.sh ends it).
# Settings: see create.sh --help.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"

[[ $# -gt 0 ]] || die "which experiment? For example experiments/imagenet256_ar.py:l --workdir gs://BUCKET/ar_l"
[[ " $* " == *" --workdir"[\ =]"gs://"* ]] || die "--workdir gs://BUCKET/FOLDER is missing: the slice's own disks go with it"

start() { # ARGUMENT...: on a worker
  [[ -x ~/dar_jax_venv/bin/dar-jax && -f ~/dar_jax/$1 ]] || { echo "no dar-jax or no $1 here: setup.sh" >&2 && return 2; }
  mkdir -p ~/dar_jax_run && cd ~/dar_jax_run || return
  exec 9>lock
  flock --nonblock 9 || { echo "a run is going on" >&2 && return 2; }
  rm -f exit
  printf '%q ' "$@" >arguments
  # The shell around dar-jax holds the lock. SIGTERM leaves no exit code: dar-jax saves and ends with 0, but is not done.
  # shellcheck disable=SC2016
  setsid bash -c '
    echo $$ >pid
    trap "exit 143" TERM
    (cd ~/dar_jax && exec ~/dar_jax_venv/bin/dar-jax train "$@" --resume) 9>&-
    echo $? >exit
  ' bash "$@" >>log 2>&1 </dev/null &
}

if [[ -z $DRY_RUN ]]; then
  states=$(on_workers all run_state "$@") || die "the workers of $NAME cannot be asked (see above)" 1
  [[ $states != *running* ]] || die "a run is going on in $NAME: logs.sh shows it, stop.sh ends it"
fi
on_workers all start "$@"
