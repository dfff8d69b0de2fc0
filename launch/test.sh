#!/usr/bin/env bash
# Installs what the tests need and runs all but the nightly ones: in one process, under torchrun with 1 to 4 ranks, under mpirun with 2 and 3.
# Two ranks run everything. One rank under torchrun, and three and four ranks, run only the tests that depend on the number of ranks:
# see tests/README.md.
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
everything=(-m "not nightly") selection=(-m "scales and not nightly")
run python "${suite[@]}" "${everything[@]}" -n auto --maxprocesses 4
run torchrun --nproc-per-node 2 "${suite[@]}" "${everything[@]}"
run mpirun -n 2 python "${suite[@]}" "${everything[@]}"
for ranks in 1 3 4; do
  run torchrun --nproc-per-node "$ranks" "${suite[@]}" "${selection[@]}"
done
run mpirun -n 3 python "${suite[@]}" "${selection[@]}"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
