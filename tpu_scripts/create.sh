#!/usr/bin/env bash
# Asks for a TPU slice and waits until it is there, which takes minutes, or days in a queue. Ctrl-C only ends the waiting; the
# same command goes on with it.
#
# usage: create.sh [--dry-run]        (--dry-run: print the commands that change something instead of running them)
#
# Settings are environment variables, the same for all scripts:
#   PROJECT, ZONE, NAME   the Google Cloud project, a zone with TPUs of the type, and a name for the slice
#   TYPE                  accelerator type: v6e-64, v5p-128, v5litepod-64 (or v5e-64), v4-32 ...
#   SPOT                  1: a spot slice, cheaper, which may be taken away at any time (see watch.sh)
#   RUNTIME               software of the machines (default: what Google names for JAX on the type)
#   CREATE_FLAGS          more flags for `gcloud compute tpus queued-resources create`, such as "--network=tpu --reserved"
#   SOURCE                for setup.sh: a git URL that the workers clone, or an archive (default: this working tree)
#   POLL                  seconds between looks at the state (default: 60)

set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"

[[ $# == 0 ]] || die "takes no arguments, and got $1; see --help"
[[ -n ${TYPE:-} ]] || die "TYPE is not set: export TYPE=v6e-64, for example"
TYPE=${TYPE/#v5e-/v5litepod-}
case $TYPE in
  v6e-*) known=v2-alpha-tpuv6e ;;
  v5p-*) known=v2-alpha-tpuv5 ;;
  v5litepod-*) known=v2-alpha-tpuv5-lite ;;
  v[234]-*) known=tpu-ubuntu2204-base ;;
  *) known=${RUNTIME:-} ;;
esac
[[ -n $known ]] || die "no RUNTIME is known for TYPE $TYPE: set one of \`gcloud compute tpus tpu-vm versions list\`"
read -ra flags <<<"${CREATE_FLAGS:-}"
case ${SPOT:-0} in
  1) flags+=(--spot) ;;
  0) ;;
  *) die "SPOT is $SPOT; set it to 1 for a spot slice, 0 for one that stays" ;;
esac

state=NONE
[[ -n $DRY_RUN ]] || state=$(slice_state)
if [[ $state == NONE ]]; then
  tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
    --runtime-version="${RUNTIME:-$known}" ${flags[@]+"${flags[@]}"}
fi
[[ -z $DRY_RUN ]] || exit 0

before=
until state=$(slice_state || echo "out of reach") && [[ $state == READY ]]; do
  [[ $state == "$before" ]] || say "$state"
  before=$state
  case $state in
    NONE | FAILED | SUSPENDED | PREEMPTED | TERMINATED) die "$NAME is $state: delete.sh, then create.sh again" 1 ;;
  esac
  sleep "${POLL:-60}"
done
say "ready"
