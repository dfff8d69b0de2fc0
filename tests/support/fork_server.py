"""The process that `forks.py` starts and asks for others: it has imported torch, and forks one for each request.

A request on standard input is a JSON list of a script, its arguments, its environment and its working directory, with three descriptors:
standard output, standard error, and a pipe for two lines, the new process's id and, when it has ended, its status as of `waitpid`.
"""

import ctypes
import gc
import json
import os
import signal
import socket
import sys
import types
from pathlib import Path

del sys.path[0]  # this folder, whose modules have common names
import torch._dynamo  # noqa: E402  optimizers and DistributedDataParallel import it
import torch.distributed  # noqa: E402, F401

MARK = sys.argv[1]  # the variable by which processes.py finds the processes of a job
C = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
gc.freeze()  # a process that ends would visit every object of torch's, which takes it a second


def serve(requests: socket.socket) -> list:
    """Returns in each new process, with what it is to run. The server ends when there are no more requests."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that wait below leave no zombies
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            end_with_parent()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            stdout, stderr, report = descriptors
            if pid := os.fork():  # this one only waits
                os.write(report, f"{os.waitpid(pid, 0)[1]}\n".encode())
                os._exit(0)
            end_with_parent()
            script, arguments, env, folder = json.loads(message)
            mark(env[MARK])
            os.write(report, f"{os.getpid()}\n".encode())  # from now on the job can find it
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            nothing = os.open(os.devnull, os.O_RDONLY)  # may be 0 itself, which children would not inherit
            os.dup2(nothing, 0)
            os.set_inheritable(0, True)
            for descriptor in descriptors:
                os.close(descriptor)
            return [script, arguments, env, folder]
        for descriptor in descriptors:
            os.close(descriptor)


def end_with_parent() -> None:
    """However the test run ends, no process is left that holds its output open."""
    C.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def mark(value: str) -> None:
    """/proc/PID/environ shows the memory in which this process was handed its variables, whatever it has set since."""
    getenv = C.getenv
    getenv.restype = ctypes.c_void_p
    ctypes.memmove(getenv(MARK.encode()), value.encode(), len(os.environ[MARK]))


def become(script: str, arguments: list[str], env: dict[str, str], folder: str) -> None:
    """Runs the script as if Python had been started with it."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # a new process would have a state of its own
    sys.argv = [script, *arguments]
    sys.path[:0] = [str(Path(script).parent), *filter(None, env.get("PYTHONPATH", "").split(":"))]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = script
    exec(compile(Path(script).read_text(), script, "exec"), vars(main))


become(*serve(socket.socket(fileno=0)))
