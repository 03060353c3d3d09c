#!/usr/bin/env bash
# Brings a run to its end: makes the slice if there is none, starts the run, looks every POLL seconds, and makes another slice
# and resumes when it was taken away. Takes the place of create.sh, setup.sh and run.sh. Can be ended (Ctrl-C) and started again
# at any time; end it before stop.sh or delete.sh. Every slice gets this working tree as it was at the start.
#
# usage: watch.sh [--dry-run] EXPERIMENT --workdir gs://BUCKET/FOLDER [OPTIONS OF dar-jax train]
#
# It ends when training has: with 0, or with the exit code of a run that fails three times, each within an hour of its start
# (once is enough for 2, wrong settings). The slice stays. Settings: see create.sh --help.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"

here=$(cd "$(dirname "$0")" && pwd)
commands=$("$here/create.sh" --dry-run && "$here/setup.sh" --dry-run && "$here/run.sh" --dry-run "$@") # checks the settings too
if [[ -n $DRY_RUN ]]; then
  "$here/delete.sh" --dry-run
  echo "$commands" && exit
fi
if [[ -z ${SOURCE:-} ]]; then
  export SOURCE=${here%/*}/build/$NAME.tar.gz
  (pack "$SOURCE")
fi

failures=0 started=
look() { # ARGUMENT...: asks the workers how the run is, and starts it if need be
  local states code
  states=$(on_workers all run_state "$@" 2>/dev/null | sort -u) || { say "the workers do not answer" && return; }
  if [[ $states == "ended 0" ]]; then say "training has ended" && exit; fi
  if [[ $states == *running* ]]; then return; fi
  code=$(sed -n 's/^ended //p' <<<"$states" | sort -n | tail -n 1)
  if ((code != 0)); then
    say "the run ended with exit code $code"
    if ((SECONDS - started > 3600)); then failures=0; fi
    failures=$((failures + 1))
    if ((failures == 3 || code == 2)); then die "gave up: see logs.sh; the slice is still there, see delete.sh" "$code"; fi
  fi
  if "$here/setup.sh" && "$here/run.sh" "$@"; then
    say "the run has been started" && started=$SECONDS
  else
    [[ -n $started ]] || die "the run could not be started (see above)" 1
  fi
}

state=$(slice_state)
if [[ $state == NONE ]]; then "$here/create.sh"; fi
while :; do
  state=$(slice_state || echo "out of reach")
  case $state in
    READY) look "$@" ;;
    SUSPENDED | FAILED | PREEMPTED | TERMINATED)
      say "$state, asking for another slice" && failures=0
      "$here/delete.sh" || true
      ;;
    *) "$here/create.sh" || true ;; # only waits for a slice that was asked for
  esac
  sleep "${POLL:-60}"
done
