#!/usr/bin/env bash
# Follows the log of the run until it ends or Ctrl-C.
#
# usage: logs.sh [--dry-run] [WORKER]
#
# WORKER is a number (default: 0, which prints the training's progress) or "all". Settings: see create.sh --help.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"

[[ $# -le 1 && ${1:-0} =~ ^([0-9]+|all)$ ]] || die "takes one worker, a number or all, and got $*; see --help"

follow() { # on a worker
  cd ~/dar_jax_run 2>/dev/null || { echo "no run was started here: run.sh" >&2 && return 2; }
  tail --lines=100 --follow --pid="$(cat pid)" log | sed --unbuffered "s/^/${HOSTNAME##*-}: /"
}

on_workers "${1:-0}" follow
