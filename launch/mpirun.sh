#!/usr/bin/env bash
# Runs a script under mpirun, Open MPI's or MPICH's, on this host or on those of a hostfile.
#
#   RANKS=4 launch/mpirun.sh train.py --lr 0.1
#   RANKS=16 HOSTFILE=hosts launch/mpirun.sh train.py
set -euo pipefail
RANKS=${RANKS:-2}
options=(-n "$RANKS")
[ -n "${HOSTFILE:-}" ] && options+=(--hostfile "$HOSTFILE")
# mpi_env.py sets what torch.distributed reads, for scripts that do not call syncbn.init_process_group().
# -m mpi4py ends all ranks when one of them raises: MPI alone would let the others wait for ever.
exec mpirun "${options[@]}" "${PYTHON:-python}" -m mpi4py "$(dirname "$0")/mpi_env.py" "$@"
