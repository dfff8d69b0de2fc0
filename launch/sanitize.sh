#!/usr/bin/env bash
# The CUDA kernels under compute-sanitizer: memory errors, races in shared memory, barriers that some threads never reach. Needs a GPU;
# takes minutes.
#
#   launch/sanitize.sh                       every op in both layouts, with every activation; some cases have a residual
#   CASES='stats and 70' launch/sanitize.sh  the cases that pytest -k selects
#   TOOLS=memcheck launch/sanitize.sh
set -euo pipefail
cd "$(dirname "$0")/.."

TOOLS=${TOOLS:-memcheck racecheck synccheck}
# A subset of the case table: planes split across blocks, channel vectors split across blocks, and unvectorized channels.
CASES=${CASES:-equals_the_reference and (97 and -first- or (256 or 9 and 70) and -last-) or misaligned or repetition}
SANITIZER=${SANITIZER:-compute-sanitizer}
PYTHON=${PYTHON:-python}

command -v "$SANITIZER" >/dev/null || { echo "sanitize.sh: $SANITIZER is not on PATH (it comes with the CUDA toolkit)" >&2; exit 2; }
"$PYTHON" -c 'from syncbn import native; cuda = native.status()[1]; raise SystemExit(0 if cuda.loaded else f"sanitize.sh: {cuda.reason}")'
for tool in $TOOLS; do
    echo "== $tool"
    # With torch's caching allocator off, an out-of-bounds write leaves its allocation and is detected. Torch's own kernels are not checked.
    output=$(PYTORCH_NO_CUDA_MEMORY_CACHING=1 SYNCBN_TEST_TIMEOUT=600 "$SANITIZER" --tool "$tool" --kernel-regex kns=syncbn \
        --error-exitcode 1 --target-processes all \
        "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/kernels/test_gpu_kernels.py -k "$CASES" | tee >(cat >&2))
    grep -q " passed" <<<"$output" || { echo "sanitize.sh: no test ran" >&2; exit 1; }
done
