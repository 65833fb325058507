#!/usr/bin/env bash
# What a machine with a GPU adds to the checks, in at most 8 minutes: the tests marked `gpu`, those of the kernels again
# under compute-sanitizer where it is installed, and `hybridengine bench` against every competitor that is installed.
#
#   OUT=somewhere benchmarks/gpu_check.sh
#
# Every file that it writes carries the name of the GPU. Exits with 1 if a test, a sanitizer or the benchmark failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${OUT:-benchmarks/results}")
python=${PYTHON:-python}
export PYTHONPATH="$PWD:$PWD/plugins${PYTHONPATH:+:$PYTHONPATH}"
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
summary() { printf '%s: %s\n' "$1" "$2" | tee -a "$prefix-summary.txt"; }
: >"$prefix-summary.txt"

# judge NAME CODE: what an exit code means; pytest's 5 is "no test selected".
judge() {
  case $2 in
    0) summary "$1" passed ;;
    5) summary "$1" "not run: no such test" ;;
    124 | 137) summary "$1" "not finished in its time" ;;
    *) summary "$1" "failed ($2)"; failed=1 ;;
  esac
}

timeout -k 10 120 "$python" -m pytest -m gpu -rs --junitxml "$prefix-tests.xml" tests/gpu tests/kernels 2>&1 | tee "$prefix-tests.txt"
judge tests "${PIPESTATUS[0]}"

# Each tool runs the kernels' own tests alone: everything is 10 to 100 times slower under it. Without torch's cache every
# tensor is an allocation of its own, so that an access beyond its end is seen.
sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)
for tool in memcheck racecheck initcheck synccheck; do
  if [ -z "$sanitizer" ]; then
    summary "$tool" "not run: compute-sanitizer is not installed"
    continue
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 40 "$sanitizer" --tool "$tool" --error-exitcode 86 \
    "$python" -m pytest -q -m gpu -k kernel -p no:cacheprovider tests/gpu tests/kernels >"$prefix-$tool.txt" 2>&1
  judge "$tool" "$?"
  tail -n 3 "$prefix-$tool.txt"
done

# An interrupt, not a kill: what is measured by then is written.
timeout -s INT -k 20 170 "$python" -m hybridengine.cli.main bench --output "$prefix-bench.json" 2>&1 | tee "$prefix-bench.txt"
judge bench "${PIPESTATUS[0]}"

echo "written to $prefix-*"
exit "$failed"
