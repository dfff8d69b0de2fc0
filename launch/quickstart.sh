#!/usr/bin/env bash
# Installs syncbn and trains a small U-Net that finds handwritten digits in images of any brightness, three ways: batch normalization per
# rank on four ranks with two images each, synchronized on the same ranks, and in a single process with all eight images. It ends with a
# table and a picture, out/segmentation.png, or with an error if the synchronized run diverges from the single process or is not clearly
# better than the first.
#
#   launch/quickstart.sh            STEPS=100 launch/quickstart.sh
set -euo pipefail
source "$(dirname "$0")/environment.sh" examples
rm -rf out/quickstart
train=(examples/segmentation.py --steps "${STEPS:-150}" --out out/quickstart)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
torchrun --nproc-per-node 4 "${train[@]}" --norm local
torchrun --nproc-per-node 4 "${train[@]}" --norm sync
python "${train[@]}" --norm local --batch-size 8
python examples/compare.py out/quickstart/*.pt --plot out/segmentation.png
