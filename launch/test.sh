#!/usr/bin/env bash
# Installs what the tests need and runs all but the nightly ones: without a launcher, under torchrun with 1 to 4 ranks, and under mpirun
# with 2 and 3. Two ranks run everything. One rank under torchrun runs only the tests that need torch.distributed, three and four ranks
# only those that depend on the number of ranks: see tests/README.md. At most two stages run at a time, and the output of one is
# shown when it ends: see stages.sh.
#
#   launch/test.sh                  launch/test.sh -k convert
set -euo pipefail
source "$(dirname "$0")/environment.sh" mpi,examples test workflows
source launch/stages.sh
export OMP_NUM_THREADS=1  # the ranks share the cores
unset PYTHONDONTWRITEBYTECODE  # some thirty processes would spend a second each on compiling the tests
suite=(-m pytest -q --color=no -p no:cacheprovider tests "$@")
everything=(-m "not nightly") selection=(-m "scales and not nightly")
stage python "${suite[@]}" "${everything[@]}" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder  # in the order of conftest.py
wait  # it has up to four workers
stage torchrun --standalone --nproc-per-node 2 "${suite[@]}" "${everything[@]}"
for ranks in 4 3 1; do
  stage torchrun --standalone --nproc-per-node "$ranks" "${suite[@]}" "${selection[@]}"
done
wait
stage mpirun -n 2 python "${suite[@]}" "${everything[@]}"
wait  # ranks of MPI poll while they wait: they leave no core idle
stage mpirun -n 3 python "${suite[@]}" "${selection[@]}"
finish
