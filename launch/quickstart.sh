#!/usr/bin/env bash
# Installs syncbn and trains a small ResNet on handwritten digits three ways: plain batch normalization on four ranks with two
# images each, synchronized batch normalization on the same ranks, and one process with the whole batch. Ends with a table and
# a plot, out/digits.png; fails if the synchronized run does not follow the one-process run.
#
#   launch/quickstart.sh            STEPS=100 launch/quickstart.sh
set -euo pipefail
source "$(dirname "$0")/environment.sh" examples
rm -rf out/quickstart
train=(examples/digits.py --steps "${STEPS:-300}" --out out/quickstart)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
torchrun --nproc-per-node 4 "${train[@]}" --norm local
torchrun --nproc-per-node 4 "${train[@]}" --norm sync
python "${train[@]}" --norm local --batch-size 8
python examples/compare.py out/quickstart/*.json --plot out/digits.png
