#!/usr/bin/env bash
# Tests and benchmarks for a machine that has a GPU, in three runs of two to three minutes each. Run 1 tests and run 2 measures,
# on one GPU. Run 3 tests exchanges in GPU memory: two ranks may share a GPU for it, and only its benchmark needs two GPUs. The script
# installs and compiles nothing: launch/gpu_build.sh must have built everything. Results go to OUT (out/gpu if not set), one file for
# each part; the output ends with a summary.
#
#   launch/gpu_day.sh 1             OUT=results PYTHON=python3 launch/gpu_day.sh 2
#   launch/gpu_day.sh --dry-run     prints each command with its limit, and checks that every file, test and option in it exists
set -euo pipefail
cd "$(dirname "$0")/.."
[ ! -d .gpu ] || chmod +x .gpu/sweep_*  # copying may have lost the mode
exec "${PYTHON:-python3}" launch/gpu_day.py "$@"
