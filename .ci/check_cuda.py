"""Compiles the CUDA kernels and reads the machine code: no spilled register, and 128-bit loads and stores where the time goes.

    python .ci/check_cuda.py [architecture ...]        default: sm_80 sm_90 sm_100

Needs nvcc (NVCC, or on PATH), and nvdisasm or cuobjdump from PATH or from the wheel nvidia-cuda-nvdisasm. Without nvcc there is
nothing to check: it says so and exits with 0.
"""

from __future__ import annotations

import collections
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KERNELS = sorted((Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu"))
# Tensors that each op reads and writes, a residual and its gradient included. A pass of its loop has `unroll` vectors of each of them.
TENSORS = {"stats": (1, 0), "normalize": (2, 1), "backward_reduce": (3, 0), "backward_input": (3, 2)}
VECTORS = {"float": 4, "double": 2, "__half": 8, "__nv_bfloat16": 8}  # elements in 16 bytes
NAME = re.compile(r"(\w+_kernel)<(\w+), syncbn::cuda::(\w+)<(\d+), (\d+),")


def run(*command: object) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def demangled(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def disassembler() -> list[str]:
    for name, arguments in (("nvdisasm", ["-c"]), ("cuobjdump", ["-sass"])):
        if found := shutil.which(name):
            return [found, *arguments]
    for folder in map(Path, sys.path):
        for found in sorted(folder.glob("nvidia/**/bin/nvdisasm")):
            return [str(found), "-c"]
    sys.exit("neither nvdisasm nor cuobjdump found: pip install nvidia-cuda-nvdisasm")


def short(name: str) -> str:
    """normalize_kernel<float, Planes<4>, 2> instead of all its template arguments; the last number is the walk's unroll factor."""
    found = NAME.search(name)
    if not found:
        return name
    kernel, scalar, walk, vector, unroll = found.groups()
    return f"{kernel}<{scalar}, {walk}<{vector}>, {unroll}>"


def spills(log: str) -> list[tuple[str, int, int]]:
    """(kernel, registers, bytes spilled), as ptxas -v reports them."""
    found = re.findall(
        r"Compiling entry function '(.+?)' for.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", log, re.DOTALL
    )
    return [(short(name), int(registers), int(stores) + int(loads)) for name, stores, loads, registers in found]


def instructions(sass: str) -> dict[str, collections.Counter[str]]:
    """How often each instruction occurs in each kernel."""
    kernels = re.split(r"\n\s*(?:\.section\s+\.text\.|Function : )", sass)[1:]
    return {
        short(demangled(kernel.split(",", 1)[0].split("\n", 1)[0])): collections.Counter(
            re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", kernel)
        )
        for kernel in kernels
    }


def narrow(kernels: dict[str, collections.Counter[str]], op: str) -> list[str]:
    """What is wrong with the loads and stores of one op."""
    if op == "peer_all_reduce":  # each value in one access, which no cache may answer: another GPU reads or writes it too
        (counts,) = kernels.values()
        return [f"{op} has no {code}.E.128.STRONG.SYS" for code in ("LDG", "STG") if not counts[f"{code}.E.128.STRONG.SYS"]]
    problems = []
    for scalar, vector in VECTORS.items():
        for layout in ("Planes", "Columns"):
            start = f"{op}_kernel<{scalar}, {layout}<{vector}>, "
            name = next((name for name in kernels if name.startswith(start)), None)
            if name is None:
                problems.append(f"{start}...> is not in the machine code")
                continue
            unroll = int(name.removeprefix(start).removesuffix(">"))
            for code, what, tensors in zip(("LDG", "STG"), ("loads", "stores"), TENSORS[op], strict=True):
                count = sum(n for full, n in kernels[name].items() if full.startswith(code) and ".128" in full)
                if count < tensors * unroll:
                    problems.append(f"{name} has {count} {what} of 128 bits, wanted {tensors * unroll}: {unroll} for each tensor")
    return problems


def main(architectures: list[str]) -> None:
    nvcc = shutil.which(os.environ.get("NVCC", "")) or shutil.which("nvcc")
    if not nvcc:
        print("check_cuda: skipped, nvcc is not on PATH")
        return
    tool, problems = disassembler(), []

    def look(architecture: str, source: Path) -> tuple[int, list[str]]:
        """The most registers of a kernel, and what is wrong."""
        cubin = Path(folder) / f"{source.stem}.{architecture}.cubin"
        kernels = spills(demangled(run(nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", source, "-o", cubin)))
        found = [] if kernels else [f"{source.name} has no kernel that ptxas reports"]
        found += [f"{name} spills {size} bytes" for name, _, size in kernels if size]
        found += narrow(instructions(run(*tool, cubin)), source.stem)
        return max((registers for _, registers, _ in kernels), default=0), [f"{architecture}: {problem}" for problem in found]

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        for architecture in architectures:
            results = list(pool.map(lambda source, architecture=architecture: look(architecture, source), KERNELS))
            problems += [problem for _, found in results for problem in found]
            print(f"check_cuda: {architecture}: {len(KERNELS)} files, at most {max(most for most, _ in results)} registers")
    if problems:
        sys.exit("check_cuda:\n  " + "\n  ".join(problems))


if __name__ == "__main__":
    main(sys.argv[1:] or ["sm_80", "sm_90", "sm_100"])
