#!/usr/bin/env bash
# The CUDA kernels under compute-sanitizer: memory errors, races in shared memory, barriers that not all threads reach. Needs a GPU;
# takes minutes.
#
#   launch/sanitize.sh                       every op in both layouts with every activation, with and without residual
#   CASES='stats and 70' launch/sanitize.sh  what pytest -k picks
#   TOOLS=memcheck launch/sanitize.sh
set -euo pipefail
cd "$(dirname "$0")/.."

TOOLS=${TOOLS:-memcheck racecheck synccheck}
# Of the table, planes in pieces that blocks share, channels in vectors that blocks share, and channels one by one.
CASES=${CASES:-equals_the_reference and (97 and -first- or (256 or 9 and 70) and -last-) or misaligned or repetition}
SANITIZER=${SANITIZER:-compute-sanitizer}
PYTHON=${PYTHON:-python}

command -v "$SANITIZER" >/dev/null || { echo "sanitize.sh: $SANITIZER is not on PATH (it comes with the CUDA toolkit)" >&2; exit 2; }
"$PYTHON" -c 'from syncbn import native; cuda = native.status()[1]; raise SystemExit(None if cuda.loaded else f"sanitize.sh: {cuda.reason}")'
for tool in $TOOLS; do
    echo "== $tool"
    # Without torch's cache of memory, a write beyond a tensor is a write beyond an allocation. Torch's own kernels are not looked at.
    said=$(PYTORCH_NO_CUDA_MEMORY_CACHING=1 SYNCBN_TEST_TIMEOUT=600 "$SANITIZER" --tool "$tool" --kernel-regex kns=syncbn \
        --error-exitcode 1 --target-processes all \
        "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/kernels/test_gpu_kernels.py -k "$CASES" | tee >(cat >&2))
    grep -q " passed" <<<"$said" || { echo "sanitize.sh: no test ran" >&2; exit 1; }
done
