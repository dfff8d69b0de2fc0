#!/usr/bin/env bash
# Tests (1) and measures (2) on a machine with one GPU, each in two to three minutes. On a machine with two GPUs or more: exchanges in their
# memory (3). Installs and compiles nothing: launch/gpu_build.sh has built everything before. Results go to OUT (out/gpu), one file for each
# part; the output ends with a summary.
#
#   launch/gpu_day.sh 1             OUT=results PYTHON=python3 launch/gpu_day.sh 2
#   launch/gpu_day.sh --dry-run     prints each command with its limit, and checks that every file, test and option in it exists
set -euo pipefail
cd "$(dirname "$0")/.."
[ ! -d .gpu ] || chmod +x .gpu/sweep_*  # copying may have lost the mode
exec "${PYTHON:-python3}" launch/gpu_day.py "$@"
