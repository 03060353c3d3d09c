#!/usr/bin/env bash
# Deletes the slice, with whatever runs on it. Checkpoints are in the bucket and stay. End watch.sh first.
#
# usage: delete.sh [--dry-run]          Settings: see create.sh --help.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"

[[ $# == 0 ]] || die "takes no arguments, and got $1; see --help"
tpus queued-resources delete "$NAME" --force
