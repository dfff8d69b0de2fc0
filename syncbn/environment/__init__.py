"""The environment: this module is the only one of the package that reads or sets `os.environ`.

The package's own variables are read and checked when the package is imported and again by `init_process_group`, before any collective;
the launchers' variables, when a rank needs them, as `init_process_group` does.

    settings             the values of SYNCBN_*; always as `environment.settings`, because `reload` replaces it
    rank_info()          this process's rank and world size, from its launcher's variables
    markdown()           the tables of docs/environment.md

`python -m syncbn.environment train.py` runs a script with the variables that torchrun would have set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from .launchers import JOB_IDS, LAUNCHERS, RankInfo, read_rank_info
from .variables import BUILD, DEVICES, MEETING, TESTS, VARIABLES, Settings, markdown

__all__ = [
    "BUILD",
    "DEVICES",
    "JOB_IDS",
    "LAUNCHERS",
    "MEETING",
    "TESTS",
    "VARIABLES",
    "RankInfo",
    "Settings",
    "announce",
    "export",
    "get",
    "markdown",
    "rank_info",
    "read_settings",
    "reload",
    "visible_devices",
]


_ANNOUNCED = "SYNCBN_ANNOUNCED"  # set for the processes that this one starts


def read_settings(env: Mapping[str, str]) -> Settings:
    """The settings that `env` contains.

    Raises:
        ValueError: a value is not allowed; the message names the variable, its value and the allowed values.
    """
    return Settings(**{variable.field: variable.read(env) for variable in VARIABLES})


settings = read_settings(os.environ)


def reload(env: Mapping[str, str] | None = None) -> None:
    """Reads the package's variables again, from the environment unless `env` is given. Raises the ValueError of `read_settings`, and
    then leaves the settings as they are."""
    global settings
    settings = read_settings(os.environ if env is None else env)


def rank_info(env: Mapping[str, str] | None = None) -> RankInfo:
    """This process's rank and world size, from the environment unless `env` is given. Raises ValueError as `read_rank_info`."""
    return read_rank_info(os.environ if env is None else env)


def get(name: str) -> str | None:
    """A variable of MEETING or DEVICES; None if it is empty or not set."""
    assert name in MEETING or name in DEVICES, name
    return os.environ.get(name) or None


def visible_devices() -> str | None:
    """CUDA_VISIBLE_DEVICES: an empty text hides all GPUs; None if it is not set, which hides none."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def announce(line: str) -> None:
    """Prints a line to stderr on rank 0, and not again in a process that this one starts: once per job, as far as a process can tell."""
    try:
        rank = rank_info().rank
    except ValueError:  # a launcher may set its other variables later; if it does not, `rank_info` raises this again for its next caller
        rank = 0
    if rank == 0 and os.environ.get(_ANNOUNCED) != line:
        os.environ[_ANNOUNCED] = line
        print(line, file=sys.stderr, flush=True)


def export(values: Mapping[str, object]) -> None:
    """Sets variables for other programs that read them."""
    os.environ.update({name: str(value) for name, value in values.items()})
