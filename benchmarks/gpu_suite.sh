#!/usr/bin/env bash
# bash benchmarks/gpu_suite.sh [PART ...] [OUT_DIR]: correctness of every kernel on this GPU, then the benchmarks.
#
# Parts: correct, tests (tests/kernels, here on the GPU), tree, kernels (qwen3-8b, qwen3-0.6b, llama-3.1-8b and
# gemma-2-9b, each a part of its own), engine, step, train, cost, vllm (where it is installed), rates, tune; all of
# them without one. Each stays under FST_LIMIT seconds (570), and writes a log and JSON into OUT_DIR
# (benchmarks/results/GPU-COMMIT). A part that fails does not stop the others; the exit status says whether one failed.
# Without a GPU, or with FST_SUITE=quick, everything is small: a rehearsal that takes minutes.
#
# Needs no install: python3 (or PYTHON) with torch runs the code where it lies. FST_WHEELS names a folder of wheels to
# unpack first, peers and what training needs (README.md); FST_COMMIT the commit, where the code came without its history.
set -uo pipefail
from="$PWD"
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
limit="${FST_LIMIT:-570}"
kernels=(qwen3-8b qwen3-0.6b llama-3.1-8b gemma-2-9b)
all=(correct tests tree "${kernels[@]}" engine step train cost vllm rates tune)

usage() {
  echo "gpu_suite.sh: $1; parts: correct tests tree kernels ${kernels[*]} engine step train cost vllm rates tune" >&2
  exit 2
}

parts=() out=""
for word in "$@"; do
  case "$word" in
    kernels) parts+=("${kernels[@]}") ;;
    */* | .) [ -z "$out" ] || usage "two output folders, $out and $word"; out="$word" ;;
    *)
      [[ " ${all[*]} " == *" $word "* ]] || usage "$word is no part (a folder is written with a slash, ./$word)"
      parts+=("$word")
      ;;
  esac
done

if [ -n "${FST_WHEELS:-}" ]; then
  [[ "$FST_WHEELS" == /* ]] || FST_WHEELS="$from/$FST_WHEELS"
  # The folder must be called site-packages: QuACK takes library code that lies anywhere else for its user's.
  site="${TMPDIR:-/tmp}/fst-wheels/site-packages"
  if [ ! -e "$site/.complete" ]; then
    for first in "$FST_WHEELS"/*.whl.part-aa; do # wheels that had to travel in pieces
      [ ! -e "$first" ] || { cat "${first%aa}"?? >"${first%.part-aa}" && rm "${first%aa}"??; } || exit 1
    done
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
      "$FST_WHEELS"/*.whl || exit 1
    touch "$site/.complete"
  fi
  export PYTHONPATH="$site:$site/nvidia_cutlass_dsl/dsl_packages${PYTHONPATH:+:$PYTHONPATH}" # what its .pth would do
  unset FST_WHEELS
fi
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 1
[ -n "$gpu" ] || FST_SUITE=quick
quick=$([ "${FST_SUITE:-}" = quick ] && echo 1)
if [ ${#parts[@]} = 0 ]; then
  parts=("${all[@]}")
  [ -z "$quick" ] || parts=(correct tests tree qwen3-8b gemma-2-9b engine step train cost vllm rates tune)
fi
commit="${FST_COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}"
name="$(echo "${gpu:-cpu}" | tr 'A-Z ' 'a-z-' | sed 's/^nvidia-//')-$commit${quick:+-quick}"
out="${out:-$PWD/benchmarks/results/$name}"
[[ "$out" == /* ]] || out="$from/$out"
mkdir -p "$out" && out="$(cd "$out" && pwd)" || exit 1

correct() {
  "$python" benchmarks/gpu_correct.py ${quick:+--quick} --json "$out/correct.json"
}

tests() {
  local workers=() files=tests/kernels
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n 6)
  [ -z "$quick" ] || files=tests/kernels/test_reference.py
  "$python" -m pytest -p no:cacheprovider "${workers[@]}" -m "gpu or not gpu" "$files" --junitxml "$out/tests.xml"
}

tree() {
  "$python" benchmarks/gpu_tree.py ${quick:+--quick} --json "$out/tree.json"
}

kernels() {
  local options=(--shape "$1") small=rehearsal
  [[ "$1" == gemma* ]] && small=rehearsal-softcap
  [ -z "$quick" ] || options=(--shape "$small" --rounds 1 --only fst_kernels eager F.)
  "$python" benchmarks/kernels.py "${options[@]}" --json "$out/$1.json" --plot "$out/$1.png"
}

engine() {
  local options=()
  [ -z "$quick" ] || options=(--problems 2 --repeats 1)
  "$python" benchmarks/engine.py "${options[@]}" --json "$out/engine.json"
}

step() {
  local options=(--attention flex "sorted sums")
  [ -z "$quick" ] || options=(--prompt 100 --problem 20 --responses 50 --rounds 1)
  "$python" benchmarks/train_step.py "${options[@]}" --json "$out/step.json"
}

train() {
  local run="$out/train-run" stream="glyph:A@20"
  [ -z "$quick" ] || stream="glyph:A@2"
  rm -rf "$run"
  "$python" -m fst_fast.train --run-dir "$run" --stream "$stream" --model.device auto --progress False --tensorboard False &&
    cp "$run/metrics.jsonl" "$out/train.jsonl" && rm -rf "$run"
}

scratch() { # KB: a folder for so large weights, in memory where there is room
  local free && free="$(df -Pk /dev/shm 2>/dev/null | awk 'END {print int($4)}')"
  [ "$free" -lt "$1" ] && echo "${TMPDIR:-/tmp}" || echo /dev/shm
}

cost() { # [ENGINE]: a cycle of FST and its steps
  local engine="${1:-torch}" tokens=128
  [ "$engine" = torch ] || tokens=512 # the embedded engine needs 40 to 80 ms a token of all
  local options=(--shape qwen3-1.7b --steps 4 --only fst --rollout.problems 32 --rollout.max-new-tokens "$tokens")
  options+=(--reflector.max-new-tokens 128 --fast.every 4 --fast.proposals 4 --fast.first-proposals 4)
  options+=(--rollout.engine "$engine" --rollout.gpu-memory 0.3) # 74 of 79 GiB
  [ -z "$quick" ] || options=(--shape rehearsal --steps 2 --only fst --rollout.problems 4 --rollout.max-new-tokens 8
    --reflector.max-new-tokens 8 --fast.every 2 --fast.first-proposals 2 --rollout.engine "$engine")
  TMPDIR="$(scratch 8000000)" "$python" benchmarks/cost.py "${options[@]}" --json "$out/cost-$engine.json"
}

vllm() { # the engine alone at the size of its user, then cost's run with it
  local shape=qwen3-8b
  "$python" -c 'import vllm' 2>/dev/null || { echo "vllm is not installed: left out"; return; }
  [ -z "$quick" ] || shape=rehearsal
  TMPDIR="$(scratch 20000000)" "$python" benchmarks/gpu_vllm.py "$shape" --gpu-memory 0.6 && cost vllm
}

rates() { # into a copy of the table; fst_fast/rates.json is what `train --plan` reads
  cp fst_fast/rates.json "$out/rates.json" && "$python" benchmarks/rates.py --table "$out/rates.json"
}

tune() {
  local options=()
  [ -z "$quick" ] || options=(--shape rehearsal --rounds 1)
  "$python" benchmarks/tune.py "${options[@]}" --json "$out/tune.json"
}

run() { # PART: under the time limit, in a shell of its own
  case "$1" in
    correct | tests | tree | engine | step | train | cost | vllm | rates | tune) "$1" ;;
    *) kernels "$1" ;;
  esac
}

if [ "${FST_PART:-}" ]; then
  run "$FST_PART"
  exit
fi

# the C++ and on a GPU the CUDA extensions, where the code lies; without a compiler the suite goes on without them
[ -z "$gpu" ] || export FST_CUDA="${FST_CUDA:-1}"
"$python" setup.py -q build_ext --inplace >"$out/build.log" 2>&1 || echo "not built: see $out/build.log"

failed=() seconds=()
for part in "${parts[@]}"; do
  started=$SECONDS
  echo "== $part"
  FST_PART="$part" timeout --kill-after=10 "$limit" bash "$0" "$part" "$out/" 2>&1 | tee "$out/$part.log"
  status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || failed+=("$part ($([ "$status" = 124 ] && echo "ran past $limit s" || echo "exit status $status"))")
  seconds+=("\"$part\": {\"seconds\": $((SECONDS - started)), \"status\": $status}")
  printf '%s\n' "${seconds[@]}" | sed '$!s/$/,/; 1s/^/{/; $s/$/}/' >"$out/parts.json"
done
echo "== results in $out"
cat "$out/parts.json"
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
