"""Runs a script with the variables that torchrun would have set, from those of mpirun or srun.

mpirun -n 4 python launch/mpi_env.py train.py --lr 0.1
"""

import os
import runpy
import sys

from syncbn.comm.rendezvous import export

if len(sys.argv) < 2:
    sys.exit(__doc__)
export()
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # where Python would have put the script's folder
runpy.run_path(sys.argv[0], run_name="__main__")
