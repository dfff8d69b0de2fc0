#!/usr/bin/env bash
# The CUDA kernels under compute-sanitizer: memory errors, then races in shared memory. Needs a GPU; takes minutes.
#
#   launch/sanitize.sh                       all ops, every tenth case or so
#   CASES='stats and 7' launch/sanitize.sh   what pytest -k picks
#   TOOLS=memcheck launch/sanitize.sh
set -euo pipefail
cd "$(dirname "$0")/.."

TOOLS=${TOOLS:-memcheck racecheck}
CASES=${CASES:-equals_the_reference and (7 or 70 or 256 or 61) or alignment or repetition}
SANITIZER=${SANITIZER:-compute-sanitizer}
PYTHON=${PYTHON:-python}

command -v "$SANITIZER" >/dev/null || { echo "sanitize.sh: $SANITIZER is not on PATH (it comes with the CUDA toolkit)" >&2; exit 2; }
for tool in $TOOLS; do
    echo "== $tool"
    # Without torch's cache of memory, a write beyond a tensor is a write beyond an allocation.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool "$tool" --error-exitcode 1 --target-processes all \
        "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/test_gpu_kernels.py -k "$CASES"
done
