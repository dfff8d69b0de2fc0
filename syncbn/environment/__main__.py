"""Runs a script or a module with the variables that torchrun would have set, from those of mpirun, srun or another launcher.

    mpirun -n 4 python -m syncbn.environment train.py --lr 0.1
    mpirun -n 4 python -m mpi4py -m syncbn.environment train.py        the same; a rank that raises ends the others
    srun python -m syncbn.environment -m package.train --lr 0.1

It is for scripts that use only torch's own init. A script that calls `syncbn.init_process_group` needs none of this.
"""

from __future__ import annotations

import os
import runpy
import sys

from ..comm.rendezvous import export


def main(arguments: list[str]) -> None:
    module = arguments[:1] == ["-m"]
    arguments = arguments[1:] if module else arguments
    if not arguments or arguments[0].startswith("-"):
        sys.exit(__doc__)
    export()
    sys.argv = arguments
    if module:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        if not getattr(sys.flags, "safe_path", False):  # since Python 3.11; else the first entry is one of the user's
            sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))  # Python would have put the script's folder there
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
