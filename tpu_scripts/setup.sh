#!/usr/bin/env bash
# Puts the code on every worker of the slice: ~/dar_jax, installed with its TPU requirements in ~/dar_jax_venv.
#
# usage: setup.sh [--dry-run]
#
# The code is what SOURCE says, a git URL or an archive (tar.gz); without it, the files of this working tree that git does not
# ignore, committed or not. Settings: see create.sh --help.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"

[[ $# == 0 ]] || die "takes no arguments, and got $1; see --help"
SOURCE=${SOURCE:-}
archive=$(cd "$(dirname "$0")/.." && pwd)/build/$NAME.tar.gz

install_package() { # [URL]: on a worker
  set -eu
  rm -rf dar_jax
  if [[ $# == 1 ]]; then
    git clone --quiet --depth 1 "$1" dar_jax
  else
    mkdir dar_jax && tar -xzf dar_jax.tar.gz -C dar_jax
  fi
  if [[ ! -x dar_jax_venv/bin/pip ]]; then # by uv, which brings a Python: the machines' own is older than dar_jax takes
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --clear --seed --python 3.12 dar_jax_venv
  fi
  dar_jax_venv/bin/pip install --quiet "./dar_jax[tpu,gcs]"
}

case $SOURCE in
  *://* | git@*)
    on_workers all install_package "$SOURCE"
    exit
    ;;
  "")
    if [[ -n $DRY_RUN ]]; then echo "# $archive: the files here that git does not ignore"; else (pack "$archive"); fi
    ;;
  *)
    [[ -f $SOURCE ]] || die "SOURCE $SOURCE is neither a git URL nor an archive that is here"
    archive=$SOURCE
    ;;
esac
tpus tpu-vm scp "$archive" "$NAME:dar_jax.tar.gz" --worker=all
on_workers all install_package
