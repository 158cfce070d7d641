#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes on one Hopper card: tests, memory checks, benches, charts.
#
#     [PYTHON=python3] [OUT=bench/results] bench/gpu_suite.sh
#
# Nothing is installed. Fails where the tests or the memory check fail; a bench cut short keeps what it has measured.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results}
export PYTHONPATH=$PWD

gpu=$("$python" -c 'import torch; print(torch.cuda.is_available())') || exit 1
if [[ $gpu != True ]]; then
  echo "no GPU that torch can use: nothing was run"
  exit 0
fi

# Only these files: others import packages that a GPU machine need not have.
mapfile -t tests < <(grep -l 'mark\.gpu' tests/test_*.py)
small="(attention_lse or add_rms_norm or qk_norm_rope or swiglu or norm_score) and bfloat16"
failed=0
summary=""

# step NAME SECONDS REQUIRED COMMAND...: run with a time limit; where REQUIRED is 1, a failure is the suite's.
step() {
  local name=$1 limit=$2 required=$3 status began=$SECONDS
  shift 3
  printf '\n== %s\n' "$name"
  timeout -k 10 "$limit" "$@"
  status=$?
  summary+=$(printf '%-12s status %-3s %4s s of %s' "$name" "$status" $((SECONDS - began)) "$limit")$'\n'
  if ((status && required)); then failed=1; fi
}

step environment 20 0 "$python" -c 'import sys; sys.path.append("bench"); import harness, torch
print(harness.environment(torch.device("cuda")))'
# Most of the time goes into compiling: one process for each dtype.
step tests 220 1 bash -c 'for part in torch.float32 torch.float16 torch.bfloat16 "not torch."; do
    "$0" -m pytest -q -m gpu -p no:cacheprovider -k "$part" "$@" & parts+=($!)
  done
  for part in "${parts[@]}"; do wait "$part" || failed=1; done
  exit ${failed:-0}' "$python" "${tests[@]}"
if command -v compute-sanitizer > /dev/null; then
  # The caching allocator would hide what lies beyond a tensor.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step memcheck 60 1 compute-sanitizer --tool memcheck --error-exitcode 9 \
    --target-processes all "$python" -m pytest -q -m gpu -k "$small" "${tests[@]}"
else
  summary+="memcheck     not run: no compute-sanitizer on PATH"$'\n'
fi
step bench 200 0 "$python" bench/bench_kernels.py --out "$out"
for folder in "$out"/*/; do
  step plot 20 0 "$python" -m bench.plot "$folder"
done

printf '\n%s' "$summary"
exit $failed
