#!/usr/bin/env bash
# Everything that needs a GPU, in three stages by value, each useful alone, for one Hopper card:
#
#     [PYTHON=python3] [OUT=bench/results] [CHECKPOINTS=FOLDER] [SIZE=full] bench/gpu_suite.sh [STAGE ...]
#
#     correctness   2 minutes   the kernels in bfloat16 against the specification, and models against transformers
#     bench         5 minutes   corpus, reranking and queries beside the other engines that are installed
#     kernels       9 minutes   all other tests, memory checks, every kernel beside its contenders, tuning, charts
#
# All three by default. Nothing is installed. Fails where a test or the memory check fails; a bench cut short keeps what
# it has measured. SIZE=tiny is a smoke test of the suite.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results}
size=${SIZE:-full}
export PYTHONPATH=$PWD

gpu=$("$python" -c 'import torch; print(torch.cuda.is_available())') || exit 1
if [[ $gpu != True ]]; then
  echo "no GPU that torch can use: nothing was run"
  exit 0
fi

# Only these files: others import packages that a GPU machine need not have.
mapfile -t tests < <(grep -l 'mark\.gpu' tests/test_*.py)
small="(attention_lse or add_rms_norm or qk_norm_rope or swiglu or norm_score) and bfloat16"
quick="gpu and not slow"
if [[ $size == full ]]; then
  all=gpu bench=(--full) tiny=() inputs=() patience=1
else
  all=$quick bench=(--quick) tiny=(--tiny) inputs=(--inputs "<Query>: gravity") patience=20
fi
failed=0
summary=""

# step NAME SECONDS REQUIRED COMMAND...: run with a time limit; where REQUIRED is 1, a failure is the suite's.
step() {
  local name=$1 limit=$2 required=$3 status began=$SECONDS
  shift 3
  printf '\n== %s\n' "$name"
  timeout -k 10 "$((limit * patience))" "$@"
  status=$?
  summary+=$(printf '%-12s status %-3s %4s s of %s' "$name" "$status" $((SECONDS - began)) "$limit")$'\n'
  if ((status && required)); then failed=1; fi
}

# pytest_parts NAME SECONDS MARKS EXPRESSION...: a process for each, since most of the time goes into compiling.
pytest_parts() {
  local name=$1 limit=$2 marks=$3
  shift 3
  MARKS=$marks TESTS=${tests[*]} step "$name" "$limit" 1 bash -c 'for part in "$@"; do
      "$0" -m pytest -q -m "$MARKS" -p no:cacheprovider -k "$part" $TESTS & parts+=($!)
    done
    for part in "${parts[@]}"; do wait "$part" || failed=1; done
    exit ${failed:-0}' "$python" "$@"
}

correctness() {
  step environment 15 0 "$python" -c 'import sys; sys.path.append("bench"); import harness, torch
print(harness.environment(torch.device("cuda")))'
  pytest_parts bfloat16 75 "$quick" "bfloat16 and attention and True" "bfloat16 and attention and not True" \
    "bfloat16 and not attention"
  step auto 30 1 "$python" -c 'import torch, warnings; from qwen3core.ops import resolve
warnings.simplefilter("error")
print(resolve("auto", torch.device("cuda")))'
  for model in tiny-embedding tiny-reranker; do
    step "$model" 15 1 "$python" -m qwen3core parity "$model" --dtype bfloat16 --ops triton "${inputs[@]}"
  done
}

bench() {
  step bench.run 300 0 "$python" -m bench.run "${bench[@]}" --out "$out" --repeats 5 --workload corpus rerank query \
    ${CHECKPOINTS:+--checkpoints "$CHECKPOINTS"}
}

kernels() {
  pytest_parts tests 150 "$all" torch.float32 torch.float16 torch.bfloat16 "not torch."
  if command -v compute-sanitizer > /dev/null; then
    # The caching allocator would hide what lies beyond a tensor.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step memcheck 60 1 compute-sanitizer --tool memcheck --error-exitcode 9 \
      --target-processes all "$python" -m pytest -q -m "$quick" -p no:cacheprovider -k "$small" "${tests[@]}"
  else
    summary+="memcheck     not run: no compute-sanitizer on PATH"$'\n'
  fi
  step contenders 200 0 "$python" bench/bench_kernels.py "${tiny[@]}" --out "$out"
  step tune 100 0 "$python" bench/bench_kernels.py "${tiny[@]}" --tune --out "$out"
  for folder in "$out"/*/; do
    step plot 15 0 "$python" -m bench.plot "$folder"
  done
}

for stage in "${@:-correctness bench kernels}"; do
  # Unquoted: the default is three.
  for name in $stage; do
    case $name in
      correctness | bench | kernels) $name ;;
      *) echo "expected correctness, bench or kernels, found $name" >&2 && exit 2 ;;
    esac
  done
done

printf '\n%s' "$summary"
exit $failed
