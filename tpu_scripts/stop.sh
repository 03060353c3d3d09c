#!/usr/bin/env bash
# Ends the run on the slice after the step at hand, with a checkpoint. The slice stays. End watch.sh first.
#
# usage: stop.sh [--dry-run]          Settings: see create.sh --help.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"

[[ $# == 0 ]] || die "takes no arguments, and got $1; see --help"

stop() { # on a worker
  cd ~/dar_jax_run 2>/dev/null || return 0
  flock --nonblock lock true && return 0
  kill -TERM "$(cat pid)" # first the shell that would record an exit code
  pkill -TERM --parent "$(cat pid)"
}

on_workers all stop
