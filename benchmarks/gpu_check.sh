#!/usr/bin/env bash
# What a machine with a GPU adds to the checks, in at most 5 minutes: the tests marked `gpu`, beside them those of the
# row kernels under compute-sanitizer where it is installed, and then `hybridengine bench` against every competitor that
# is installed.
#
#   OUT=somewhere benchmarks/gpu_check.sh
#
# Environment:
#   OUT      where the files go; each carries the name of the GPU (default: benchmarks/results)
#   PYTHON   the interpreter (default: python)
#   SECONDS_OF_TESTS, SECONDS_OF_BENCH   limits (default: 110, 170)
#   BENCH    options of `hybridengine bench` (default: the losses and the perturbations, without torch.compile)
#
# Exits with 1 if a test, a sanitizer or the benchmark failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${OUT:-benchmarks/results}")
python=${PYTHON:-python}
tests_limit=${SECONDS_OF_TESTS:-110} bench_limit=${SECONDS_OF_BENCH:-170}
ops="cross_entropy linear_cross_entropy kl_pair perturb perturb_weights"
bench=${BENCH:-$(printf -- '--op %s ' $ops) --against torch,low-memory,liger,quack,cce}
export PYTHONPATH="$PWD:$PWD/plugins${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$out"

if ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
  echo "gpu_check: torch sees no GPU here; run this on a machine with one" >&2
  exit 2
fi
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name())')
prefix="$out/$(tr -cs 'A-Za-z0-9\n' '-' <<<"$device" | tr 'A-Z' 'a-z')"
{
  "$python" -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__, torch.version.cuda)'
  nvidia-smi 2>&1
  "$python" -m hybridengine.cli.main kernels 2>&1
} | tee "$prefix-device.txt"

failed=0
: >"$prefix-summary.txt"
summary() { printf '%s: %s\n' "$1" "$2" | tee -a "$prefix-summary.txt"; }

# judge NAME CODE: what an exit code means; pytest's 5 is "no test selected".
judge() {
  case $2 in
    0) summary "$1" passed ;;
    5) summary "$1" "not run: no such test" ;;
    124 | 137) summary "$1" "not finished in its time" ;;
    *) summary "$1" "failed ($2)"; failed=1 ;;
  esac
}

# Everything is 10 to 100 times slower under a sanitizer: every ninth case of the row kernels and their edges. Without
# torch's cache every tensor is an allocation of its own, so that an access beyond its end is seen.
sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)
declare -A running
for tool in memcheck racecheck initcheck synccheck; do
  if [ -z "$sanitizer" ]; then
    summary "$tool" "not run: compute-sanitizer is not installed"
    continue
  fi
  HE_EVERY=9 PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 "$tests_limit" \
    "$sanitizer" --tool "$tool" --error-exitcode 86 "$python" -m pytest -q -m gpu -p no:cacheprovider -W ignore \
    tests/gpu/test_gpu_kernels.py -k "float64 or edges" >"$prefix-$tool.txt" 2>&1 &
  running[$tool]=$!
done

workers=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 6")
timeout -k 10 "$tests_limit" "$python" -m pytest -q -m gpu $workers -p no:cacheprovider -W ignore -rs \
  --junitxml "$prefix-tests.xml" tests/gpu tests/kernels 2>&1 | tee "$prefix-tests.txt"
judge tests "${PIPESTATUS[0]}"
for tool in "${!running[@]}"; do
  wait "${running[$tool]}"
  judge "$tool" "$?"
  tail -n 3 "$prefix-$tool.txt"
done

# What is measured by then is written.
timeout -s INT -k 20 "$bench_limit" "$python" -m hybridengine.cli.main bench $bench --output "$prefix-bench.json" 2>&1 |
  tee "$prefix-bench.txt"
judge bench "${PIPESTATUS[0]}"

echo "written to $prefix-*"
exit "$failed"
