#!/usr/bin/env bash
# Installs what the tests need and runs them: in one process, under torchrun with 1 to 4 ranks, under mpirun with 2 and 3.
#
#   launch/test.sh                  launch/test.sh -k convert
set -euo pipefail
source "$(dirname "$0")/environment.sh" mpi,examples test workflows
export OMP_NUM_THREADS=1  # the ranks share the cores
export SYNCBN_FUZZ=${SYNCBN_FUZZ:-9}  # seconds of random layers in each of the seven runs, a minute in all
failed=()
run() {
  echo "== $*"
  "$@" || failed+=("$*")
}
suite=(-m pytest -q --color=no -p no:cacheprovider tests "$@")
run python "${suite[@]}" -n auto --maxprocesses 4
run torchrun --nproc-per-node 1 "${suite[@]}" -m "not world_size"  # the tests for one rank have run already
for ranks in 2 3 4; do
  run torchrun --nproc-per-node "$ranks" "${suite[@]}"
done
for ranks in 2 3; do
  run mpirun -n "$ranks" python "${suite[@]}"
done
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
