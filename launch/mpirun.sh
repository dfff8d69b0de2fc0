#!/usr/bin/env bash
# Runs a script under mpirun, Open MPI's or MPICH's, on this host or on those of a hostfile.
#
#   RANKS=4 launch/mpirun.sh train.py --lr 0.1
#   RANKS=16 HOSTFILE=hosts launch/mpirun.sh train.py
set -euo pipefail
RANKS=${RANKS:-2}
options=(-n "$RANKS")
[ -n "${HOSTFILE:-}" ] && options+=(--hostfile "$HOSTFILE")
# syncbn.environment sets torchrun's variables, for scripts that do not call syncbn.init_process_group().
# mpi4py ends all ranks when one of them raises: MPI alone would let the others wait forever.
exec mpirun "${options[@]}" "${PYTHON:-python}" -m mpi4py -m syncbn.environment "$@"
