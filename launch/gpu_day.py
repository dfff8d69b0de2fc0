"""Runs the parts in gpu_parts.py, each within its limit, or checks that they could run: see gpu_day.sh."""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout, suppress

from gpu_parts import ENVIRONMENT, LIBRARY, OUT, ROOT, RUNS, Part

WIDTH = 170  # of a line of the summary
GRACE = 5  # seconds that a launcher has to end its ranks
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "torch._dynamo"])  # once: each import takes seconds


# ---- Running ------------------------------------------------------------------------------------------------------------------


def run(part: Part) -> tuple[bool, str]:
    """(whether it succeeded, one line about it); its output is in OUT."""
    env = os.environ | ENVIRONMENT | part.env
    began, why = time.monotonic(), ""
    with (OUT / f"{part.name}.txt").open("w", errors="replace") as file:
        for command in part.commands:
            left = part.limit - (time.monotonic() - began)
            try:
                status = run_command(command, env, file, left)
                why = why or (f"{command[0]} exits with {status}" if status else "")
            except subprocess.TimeoutExpired:
                why = f"stopped at its limit of {part.limit} s"
                break
            except OSError as error:
                why = why or str(error)
    if not why and not re.search(part.requires, output(part), re.MULTILINE):
        why = f"no line of its output has {part.requires!r}"
    return not why, f"== {part.name}: {'FAILED, ' + why if why else 'ok'}, {time.monotonic() - began:.0f} s"


def run_command(command: tuple[str, ...], env: dict[str, str], file, limit: float) -> int:
    """The command's exit status. At the limit it gets SIGTERM and some seconds to end what it has started, because torchrun's ranks have
    sessions of their own; then its own session is killed."""
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(max(limit, 0))
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def output(part: Part) -> str:
    return (OUT / f"{part.name}.txt").read_text(errors="replace")


def summary(part: Part, line: str) -> list[str]:
    shown = [row.strip() for row in output(part).splitlines() if re.search(part.shows, row)]
    return [row[:WIDTH] for row in (line, *shown[-part.lines :])]


def run_groups(groups: Sequence[tuple[Part, ...]]) -> int:
    """The parts of a group run side by side."""
    OUT.mkdir(parents=True, exist_ok=True)
    lines, failed, vital = [], False, []
    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:
            for part, (succeeded, line) in zip(group, pool.map(run, group), strict=True):
                print(line, flush=True)
                lines += summary(part, line)
                failed = failed or not succeeded
                vital += [part.name] if part.vital and not succeeded else []
        if vital:
            lines.append(f"== {vital[0]} has failed: what follows would show nothing, and was left out")
            break
    print("\n".join(["", "-- summary", *lines]), flush=True)
    return int(failed)


# ---- Checking without a card --------------------------------------------------------------------------------------------------


def dry_run(runs: Mapping[str, tuple[int, Sequence[tuple[Part, ...]]]]) -> int:
    """Prints each command with its limit; then what is missing, if anything is."""
    problems = [] if LIBRARY.exists() else [f"{LIBRARY.relative_to(ROOT)} is missing: run launch/gpu_build.sh"]
    for number, (limit, groups) in runs.items():
        total = sum(max(part.limit for part in group) for group in groups)
        print(f"-- gpu_day.sh {number}: at most {total} s")
        problems += [f"the limits of {number} add up to {total} s, more than {limit}"] if total > limit else []
        commands = [(part, command) for group in groups for part in group for command in part.commands]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for (part, command), (remark, wrong) in zip(commands, pool.map(lambda each: check(*each), commands), strict=True):
                print(f"{part.limit:4} s  {part.name:9}  {shlex.join([*(f'{k}={v}' for k, v in part.env.items()), *command])}{remark}")
                problems += [f"{part.name}: {problem}" for problem in wrong]
    print("\n".join(problems) or "everything is there")
    return int(bool(problems))


def check(part: Part, command: tuple[str, ...]) -> tuple[str, list[str]]:
    """(a remark, what is wrong) of one command."""
    program = ROOT / command[0]
    if "pytest" in command:
        ranks = int(command[command.index("--nproc-per-node") + 1]) if "--nproc-per-node" in command else 1
        return check_selection(command[command.index("pytest") + 1 :], ranks)
    if command[0] == sys.executable:
        starts = [at for at, word in enumerate(command) if word == sys.executable]  # a launcher's, and that of its ranks
        ends = [*starts[1:], None]
        return "", [p for at, end in zip(starts, ends, strict=True) for p in check_options(command[at + 2], command[at + 3 : end])]
    if "/" not in command[0]:
        return "  (comes with the driver)", []
    if not os.access(program, os.X_OK):
        return "", [f"{command[0]} is missing: run launch/gpu_build.sh" if ".gpu" in command[0] else f"{command[0]} is no program"]
    if program.suffix == ".sh":
        unread = [name for name in part.env if f"{name}=${{{name}:-" not in program.read_text()]
        remark, wrong = check_selection(("tests/kernels/test_gpu_kernels.py", "-k", part.env["CASES"]), 1)
        return remark, [*wrong, *(f"{command[0]} reads no {name}" for name in unread)]
    help = subprocess.run([program, "--help"], capture_output=True, text=True)
    return "", [] if help.returncode == 0 else [f"{command[0]} --help: {help.stderr.strip()}"]


def check_selection(arguments: tuple[str, ...], ranks: int) -> tuple[str, list[str]]:
    """How many tests pytest collects for these arguments in the first of `ranks` ranks, as on a machine with a GPU."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)} if ranks > 1 else {}
    quiet = [] if "-q" in arguments else ["-q"]  # twice, it leaves out the count
    status, output = run_module("pytest", ["--collect-only", "--assume-gpu", *quiet, *arguments], place)
    if status == 0 and (count := re.search(r"^(\d+)(?:/\d+)? tests? collected", output, re.MULTILINE)):
        return f"  ({count[1]} tests)", []
    return "", [f"pytest collects no test for {shlex.join(arguments)}:\n{output.strip()[-600:]}"]


def check_options(module: str, arguments: tuple[str, ...]) -> list[str]:
    status, help = run_module(module, ["--help"])
    if status:
        return [f"-m {module} --help: {help.strip()[-300:]}"]
    return [f"-m {module} has no {name}" for name in arguments if name.startswith("--") and not re.search(rf"{name}\b", help)]


def run_module(module: str, arguments: Sequence[str], env: Mapping[str, str] = {}) -> tuple[object, str]:
    """The exit status, and the output, of `python -m module` with these further variables."""
    with ProcessPoolExecutor(1, FORKS) as process:
        return process.submit(become, module, arguments, env).result()


def become(module: str, arguments: Sequence[str], env: Mapping[str, str]) -> tuple[object, str]:
    os.chdir(ROOT)
    os.environ.update(env)
    sys.path.insert(0, str(ROOT))
    sys.argv = [module, *arguments]
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(output):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            status: object = 0
        except SystemExit as end:
            status = end.code or 0
        except Exception:
            traceback.print_exc()
            status = 1
    return status, output.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/gpu_day.sh")
    parser.add_argument("number", nargs="?", choices=list(RUNS))
    parser.add_argument("--dry-run", action="store_true", help="print each command, and check that what it names exists")
    args = parser.parse_args()
    if args.dry_run:
        return dry_run({args.number: RUNS[args.number]} if args.number else RUNS)
    if args.number is None:
        parser.error("which run: 1, 2 or 3?")
    return run_groups(RUNS[args.number][1])


if __name__ == "__main__":
    sys.exit(main())
