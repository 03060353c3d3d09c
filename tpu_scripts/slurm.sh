#!/usr/bin/env bash
# Submits a training run to SLURM: one process on each node, with all GPUs asked for there. Five minutes before its time is up,
# the job saves a checkpoint and queues itself again, until training has ended.
#
# usage: slurm.sh [--dry-run] [--here] EXPERIMENT --workdir FOLDER [OPTIONS OF dar-jax train]
#
# runs `dar-jax train EXPERIMENT ... --resume` in the folder this is called in, with the dar-jax that is found here: activate
# its environment first. FOLDER has to be seen by all nodes. --here starts at once, in the allocation at hand (salloc).
#
# Settings are environment variables:
#   GPUS, CPUS, NODES     GPUs and CPUs on each node, and nodes (default: 1)
#   SBATCH_...            what sbatch takes from there: SBATCH_TIMELIMIT, SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS ...

set -euo pipefail

die() { # MESSAGE
  printf 'slurm.sh: %s\n' "$1" >&2
  exit 2
}

DRY_RUN='' HERE=''
while [[ ${1:-} == -* ]]; do
  case $1 in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --here) HERE=1 ;;
    *) die "there is no option $1 here (those of dar-jax come after the experiment); see --help" ;;
  esac
  shift
done
[[ " $* " == *" --workdir"[\ =]* ]] || die "which experiment, and where to? Such as experiments/cifar10_ar.py --workdir runs/ar"

if [[ -n $HERE ]]; then
  gpus=${SLURM_GPUS_ON_NODE:-}
  [[ -n $gpus ]] || die "there is no allocation with GPUs here: leave --here out"
  command=(srun --ntasks-per-node=1 --gpus-per-node="$gpus" --kill-on-bad-exit=1
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}"
    dar-jax train "$@" --resume)
else
  [[ -n ${GPUS:-} && -n ${CPUS:-} ]] || die "GPUS or CPUS is not set: export GPUS=8 CPUS=64, with what each node has"
  command=(sbatch --job-name="$(basename "${1/.py:/_}" .py)" --nodes="${NODES:-1}" --ntasks-per-node=1 --gpus-per-node="$GPUS"
    --cpus-per-task="$CPUS" --requeue --signal=B:USR1@300 --output=%x-%j.log --open-mode=append "$0" --here "$@")
fi
if [[ -n $DRY_RUN ]]; then printf '%q ' "${command[@]}" && echo && exit; fi
command -v dar-jax >/dev/null || die "there is no dar-jax on the PATH: activate the environment it is installed in"
[[ -n $HERE ]] || exec "${command[@]}"

again='' code=0
trap 'again=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # reaches dar-jax, but not this shell
"${command[@]}" &
wait $! || code=$?
if [[ -n $again ]]; then # the signal ended that wait
  wait $! || true
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
