#!/usr/bin/env bash
# Compiles, on a machine without a GPU, the files that launch/gpu_day.sh needs on a machine with one: the library for its architecture, in
# place, and benchmarks/sweep.cu, in .gpu/, for each op, with the current kernels and with those of the revision BEFORE.
#
#   launch/gpu_build.sh             ARCH=8.0 BEFORE=HEAD~10 MAX_JOBS=2 launch/gpu_build.sh             BEFORE= launch/gpu_build.sh
set -euo pipefail
cd "$(dirname "$0")/.."

ARCH=${ARCH:-9.0}  # compute capability of the GPU
# Default: the revision before the reductions used tiles of one memory line; the tables of both show what that change gained.
BEFORE=${BEFORE-$(git log -1 --format=%H^ -S'pixels_width = 32' -- csrc/cuda/plans.cuh 2>/dev/null || true)}
NVCC=${NVCC:-nvcc}
PYTHON=${PYTHON:-python}
export MAX_JOBS=${MAX_JOBS:-$(nproc)}

command -v "$NVCC" >/dev/null || { echo "gpu_build.sh: $NVCC is not on PATH (it comes with the CUDA toolkit)" >&2; exit 2; }
rm -rf .gpu
mkdir -p .gpu

# Not with --inplace, which would remove the library for CPUs.
TORCH_CUDA_ARCH_LIST=$ARCH SYNCBN_BUILD_CUDA=1 SYNCBN_BUILD_CPU=0 "$PYTHON" setup.py -q build_ext --build-lib build/gpu
mv build/gpu/syncbn/libsyncbn_cuda.so syncbn/

# sweeps FOLDER NAME: compiles the sweeps of the sources in FOLDER. It names kernels that spill registers: their Plans must not be used.
sweeps() {
  printf '%s\n' stats normalize backward_reduce backward_input | xargs -P "$MAX_JOBS" -I{} \
    "$NVCC" -std=c++17 -O3 -diag-suppress=177 "-arch=sm_${ARCH/./}" -Xptxas --warn-on-spills -I "$1/csrc/cuda" -DSWEPT_OP={} \
    "$1/benchmarks/sweep.cu" -o ".gpu/sweep_{}_$2" 2>&1 | c++filt | sed -E 's/syncbn::cuda:://g
      s/^ptxas warning : Registers are spilled .*\W(\w+_kernel<[^(]*>).*, ([0-9]+) bytes spill stores.*/'"$2"': \1 spills \2 bytes/'
}
sweeps . now
if [ -n "$BEFORE" ] && git cat-file -e "$BEFORE:benchmarks/sweep.cu" 2>/dev/null; then
  mkdir .gpu/source
  git archive "$BEFORE" csrc benchmarks | tar -x -C .gpu/source
  cp benchmarks/sweep.h .gpu/source/benchmarks/  # so that both print the same tables
  sweeps .gpu/source before
  rm -r .gpu/source
else
  echo "gpu_build.sh: no sweep of the kernels before a change: ${BEFORE:-BEFORE} is no revision with benchmarks/sweep.cu"
fi
ls -sh1 syncbn/libsyncbn_cuda.so .gpu/
