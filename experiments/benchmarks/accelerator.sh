#!/usr/bin/env bash
# All that waits to be measured on an accelerator, in parts that can be resumed.
#
# Command:  experiments/benchmarks/accelerator.sh OUT --data DIR
#           (in an environment where `pip install ".[cuda]"` was done; DIR: the binary version of CIFAR-10)
# Options:  --minutes 9   ends in time: a part whose estimate does not fit is not begun; the same command goes on with it
#           --parts a,b   only these (see PARTS); `report` writes OUT/tables.md from whatever is there
#           --toy         sizes that a CPU can do (12 minutes on two cores), and 96 of the images, to see that every part works; the
#                         numbers mean nothing
#           --python P    python by default
#
# A part is done when its JSON is in OUT. Targets, none of them measured yet (H200, H100): MFU of 50 % for L and XL, 45 % for the
# tokenizer; L at batch 1 at 70 % of its memory bound, the first preview within 30 ms; XL at batch 256 100 images/s;
# CIFAR-10 within an hour in all: rFID below 8, gFID below 15.
set -euo pipefail

PARTS="train_tokenizer train_l train_xl train_muon sampling_l sampling_xl attention cifar_tokenizer cifar_rfid cifar_codes cifar_ar
cifar_bits cifar_samples cifar_fid report"

out= data= minutes=600 parts=$PARTS toy= python=python
while [ $# -gt 0 ]; do
  case $1 in
    --data) data=$2; shift ;;
    --minutes) minutes=$2; shift ;;
    --parts) parts=${2//,/ }; shift ;;
    --python) python=$2; shift ;;
    --toy) toy=1 ;;
    -*) echo "accelerator.sh: no option $1" >&2; exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
[ -n "$out" ] || { echo "accelerator.sh: give the folder to write to" >&2; exit 2; }
for part in $parts; do
  case " $(echo $PARTS) " in *" $part "*) ;; *) echo "accelerator.sh: no part $part; there are $(echo $PARTS)" >&2; exit 2 ;; esac
  case $part in cifar*) [ -n "$data" ] || { echo "accelerator.sh: $part needs --data" >&2; exit 2; } ;; esac
done
mkdir -p "$out"
here=$(cd "$(dirname "$0")" && pwd)
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(cd "$out" && pwd)/compiled}
begun=$SECONDS

bench() { # script, JSON, options
  local script=$1 json=$2
  shift 2
  "$python" "$here/$script.py" --json "$out/$json.json" "$@"
}
dar() { "$python" -m dar_jax "$@"; }
done_file() { echo "{\"seconds\": $((SECONDS - started))}" > "$out/$1.json"; }
train() { # part, experiment, options: until the end, or until the time is up, with a checkpoint
  local part=$1 left=$((minutes * 60 - SECONDS + begun - 30)) status=0
  shift
  timeout -s TERM "$left" "$python" -m dar_jax train "$@" --resume || status=$?
  [ $status = 124 ] && { echo "$part goes on with the same command"; exit 0; }
  return $status
}

if [ -n "$toy" ]; then
  models=(tokenizer B B); remats=none; timed=(--dtype float32 --repeats 1)
  trained=(--batch-sizes 1 --steps 1 "${timed[@]}"); sampled=(--batch-sizes 1 "${timed[@]}")
  attended=(--tokens 128 --batch-sizes 1); steps=(--train.steps 4 --train.batch-size 8); shown=16
  if [ -n "$data" ]; then
    mkdir -p "$out/data"
    find "$data" -name "*.bin" | while read -r file; do head -c $((16 * 3073)) "$file" > "$out/data/${file##*/}"; done # 16 images
    data=$out/data
  fi
else
  models=(tokenizer L XL); remats=none,dots; trained=(--batch-sizes 64,128,256); sampled=(--batch-sizes 1,8,64,256)
  attended=(); steps=(); shown=10000
fi

for part in $parts; do
  [ -f "$out/$part.json" ] && continue
  case $part in # minutes that a part may take
    train_xl | sampling_xl) needed=8 ;;
    train_* | sampling_*) needed=6 ;;
    cifar_tokenizer | cifar_ar) needed=3 ;; # they stop and resume
    cifar_*) needed=4 ;;
    *) needed=2 ;;
  esac
  if [ -z "$toy" ] && [ $((minutes * 60 - SECONDS + begun)) -lt $((needed * 60)) ]; then
    echo "$part needs up to $needed minutes; give the same command again"
    exit 0
  fi
  echo "== $part"
  started=$SECONDS
  case $part in
    train_tokenizer) bench train_step $part --models ${models[0]} --remats $remats "${trained[@]}" ;;
    train_l) bench train_step $part --models ${models[1]} --remats $remats "${trained[@]}" ;;
    train_xl) bench train_step $part --models ${models[2]} --remats $remats "${trained[@]}" ;;
    train_muon) bench train_step $part --models ${models[1]} --remats none --optimizer muon "${trained[@]}" ;;
    sampling_l) bench sampling $part --models ${models[1]} "${sampled[@]}" ;;
    sampling_xl) bench sampling $part --models ${models[2]} "${sampled[@]}" ;;
    attention) bench attention $part "${attended[@]}" ;;
    cifar_tokenizer)
      train $part "$here/../cifar10_tokenizer.py" --workdir "$out/cifar/tokenizer" --data.path "$data" "${steps[@]}"
      done_file $part ;;
    cifar_rfid) dar evaluate-tokenizer "$out/cifar/tokenizer" --num-images $shown --json "$out/$part.json" ;;
    cifar_codes)
      dar tokenize "$out/cifar/tokenizer" --data.crop ten_crop --data.path "$data" --out "$out/cifar/codes"
      done_file $part ;;
    cifar_ar)
      train $part "$here/../cifar10_ar.py" --workdir "$out/cifar/ar" --tokenizer "$out/cifar/tokenizer" --data.source codes \
        --data.path "$out/cifar/codes" "${steps[@]}"
      done_file $part ;;
    cifar_bits)
      dar evaluate-ar "$out/cifar/ar" --data.source cifar10 --data.path "$data" --data.split test --num-images $shown \
        --out "$out/cifar/bits"
      cp "$out/cifar/bits/report.json" "$out/$part.json" ;;
    cifar_samples)
      dar generate "$out/cifar/ar" --num $shown --out "$out/cifar/samples.npz"
      done_file $part ;;
    cifar_fid)
      dar evaluate "$out/cifar/samples.npz" --reference "cifar10/train:$data" --json "$out/$part.json" ;;
    report) "$python" "$here/tables.py" $(ls "$out"/*.json) > "$out/tables.md" && echo "$out/tables.md" ;;
  esac
done
