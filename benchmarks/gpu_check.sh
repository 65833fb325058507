#!/usr/bin/env bash
# What a machine with a GPU adds to the checks: the tests marked `gpu`.
#
#   OUT=somewhere benchmarks/gpu_check.sh
#
# The kernels for GPUs are among them; nothing is timed yet.
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
"$python" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())' | tee "$out/gpu.txt"

failed=0
"$python" -m pytest -m gpu -rs --junitxml "$out/gpu-tests.xml" tests/gpu 2>&1 | tee "$out/gpu-tests.txt" || failed=1
exit "$failed"
