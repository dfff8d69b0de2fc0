"""Builds the compiled kernels next to the Python files: syncbn/libsyncbn_cpu.so and syncbn/libsyncbn_cuda.so.

They use torch's stable ABI and no Python, so one wheel (py3-none-PLATFORM) serves every Python and torch >= 2.11. A library that
cannot be compiled is left out, and the reference runs in its place: the reason is printed (`pip install -v` shows it) and kept next to the
Python files, for the warning when syncbn is imported. A build that has a compiler and sees no torch fails.

    SYNCBN_BUILD_CPU      0: leave the CPU library out; 1: fail if it cannot be built; unset: build it if there is a C++ compiler
    SYNCBN_BUILD_CUDA     the same for the CUDA library and nvcc, whether or not the installed torch has CUDA
    SYNCBN_PLANS          a header with other Plans than csrc/cuda/plans.cuh
    TORCH_CUDA_ARCH_LIST  such as "8.0;9.0+PTX"; default: the ARCHITECTURES below that nvcc knows, and PTX for the newest of them
    CXX, NVCC             the compilers
    MAX_JOBS              compilers that run at once; default: one per core
"""

import ast
import hashlib
import os
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1
    from wheel.bdist_wheel import bdist_wheel

TARGET = "0x020b000000000000"  # torch 2.11, the oldest that the libraries run with
ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
CXXFLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# The kernels use neither errno nor floating-point traps, and both would prevent the vectorization of sqrt and comparisons.
MATHFLAGS = ["-fno-math-errno", "-fno-trapping-math"]
# GCC's -O2 vectorizes no loop before GCC 12, and later none that may need a second version or a tail; clang's has no such restriction.
GCC_FLAGS = ["-ftree-vectorize", "-fvect-cost-model=dynamic"]
ONCE = ("bindings", "dispatch", "shared_memory", "shared_memory_exports")  # files of csrc/cpu that are compiled for the baseline only
ISAS = {"avx512": ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"], "avx2": ["-march=x86-64-v3"], "baseline": []}


class CannotBuild(Exception):
    """The reason, as the rest of a sentence."""


def compiler() -> list[str]:
    return chosen("CXX") or first_of("c++", "g++", "clang++", what="C++ compiler")


def chosen(variable: str) -> list[str]:
    """The command in this environment variable, such as `ccache g++`; empty if it is not set."""
    command = shlex.split(os.environ.get(variable, ""))
    if command and not shutil.which(command[0]):
        raise CannotBuild(f"{variable} is {os.environ[variable]!r}, which is not on PATH")
    return command


def first_of(*names: str, what: str) -> list[str]:
    for name in names:
        if found := shutil.which(name):
            return [found]
    raise CannotBuild(f"no {what} is on PATH")


class NoTorch(CannotBuild):
    """There is a compiler, and no torch to compile against: most often an isolated build, which a flag cures."""

    def __str__(self) -> str:
        return (
            "the kernels need torch >= 2.11, which this build does not see. Install torch first, then use `pip install"
            " --no-build-isolation .`, or `uv pip install --no-build-isolation .`; or set SYNCBN_BUILD_CPU=0 and SYNCBN_BUILD_CUDA=0 to"
            " install plain Python, which is slower"
        )


def torch_folder() -> Path:
    """The folder of an installed torch. Any from 2.11 on will do: the libraries use what 2.11 has, whatever newer headers declare.

    An isolated build runs in an environment of its own. In pip's, Python still reports the folders of the environment to install into. In
    uv's it does not: that environment is on PATH if it is active, and otherwise uv takes .venv in this folder.
    """
    folders = [Path(folder) for folder in (*sys.path, sysconfig.get_path("purelib"), *site.getsitepackages())]
    for environment in [Path(".venv"), *(Path(folder).parent for folder in os.get_exec_path())]:
        folders += sorted(environment.glob("lib/python3*/site-packages"))
    oldest = int(TARGET[2:4], 16), int(TARGET[4:6], 16)
    for file in (folder / "torch/version.py" for folder in folders):
        version = re.search(r"^__version__ = '(\d+)\.(\d+)", file.read_text(), re.MULTILINE) if file.exists() else None
        if version and tuple(map(int, version.groups())) >= oldest:
            return file.parent.resolve()
    raise NoTorch


def schemas_digest() -> str:
    """The digest of SCHEMAS in syncbn/ops.py, which cannot be imported: an isolated build has no torch."""
    body = ast.parse(Path("syncbn/ops.py").read_text()).body
    (table,) = (node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SCHEMAS")
    return runpy.run_path("syncbn/build_info.py")["digest"](ast.literal_eval(table))


def torch_flags() -> tuple[list[str], list[str]]:
    """(compile flags, link flags) of the bindings."""
    torch = torch_folder()
    return [f"-DTORCH_TARGET_VERSION={TARGET}", "-isystem", str(torch / "include")], [f"-L{torch / 'lib'}", "-ltorch_cpu"]


def cpu_commands(temp: Path) -> tuple[list[list[str]], list[str]]:
    """([compile command, ...], link command); each compile command ends with the path of its object."""
    cxx, (include, link) = compiler(), torch_flags()
    # Not platform.machine(): a cross compiler's code is for another processor than the one that runs the compiler.
    x86 = subprocess.run([*cxx, "-dumpmachine"], capture_output=True, text=True).stdout.startswith("x86_64")
    is_clang = "clang" in subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout
    optimize = MATHFLAGS if is_clang else [*MATHFLAGS, *GCC_FLAGS]
    sources, commands = sorted(Path("csrc/cpu").glob("*.cpp")), []
    if not sources:
        raise CannotBuild("csrc/cpu has no kernels")
    for source in sources:
        flags = [*cxx, *CXXFLAGS, *optimize, "-c", str(source)]
        if source.stem in ONCE:
            flags += include if source.stem == "bindings" else []
            commands.append([*flags, *(["-DSYNCBN_X86"] if x86 else []), "-o", str(temp / f"{source.stem}.o")])
            continue
        # The same file once for each instruction set, in a namespace of that name.
        for isa in ISAS if x86 else ["baseline"]:
            commands.append([*flags, f"-DSYNCBN_ISA={isa}", *ISAS[isa], "-o", str(temp / f"{source.stem}.{isa}.o")])
    commands.append(build_info(cxx, temp))
    commands.sort(key=lambda command: "backward_reduce" not in command[-1])  # the longest first
    return commands, [*cxx, "-shared", *link]


def build_info(cxx: list[str], temp: Path, *flags: str) -> list[str]:
    """The command for what syncbn/build_info.py reads in a library."""
    schemas = f'-DSYNCBN_SCHEMAS="{schemas_digest()}"'
    return [*cxx, *CXXFLAGS, *flags, schemas, "-c", "csrc/bindings/build_info.cpp", "-o", str(temp / "build_info.o")]


def cuda_commands(temp: Path) -> tuple[list[list[str]], list[str]]:
    """As cpu_commands. nvcc compiles the kernels, without torch's headers; the C++ compiler compiles the bindings."""
    nvcc = chosen("NVCC") or first_of("nvcc", what="nvcc")
    kernels, bindings = sorted(Path("csrc/cuda").glob("*.cu")), sorted(Path("csrc/cuda").glob("*.cpp"))
    if not kernels:
        raise CannotBuild("csrc/cuda has no kernels")
    cxx, (include, link) = compiler(), torch_flags()
    dryrun = subprocess.run([*nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    toolkit_include, toolkit_lib = re.findall(r'INCLUDES=.*?"-I([^"]+)"', dryrun), re.findall(r'"-L([^"]+)"', dryrun)
    gencode, names = architectures(nvcc)
    plans = [flag for path in other_plans() for flag in ("-include", str(path))]
    compile = [*nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *gencode, *plans, "-c"]
    commands = [[*compile, str(f), "-o", str(temp / f"{f.stem}.cu.o")] for f in kernels]
    includes = ["-DUSE_CUDA", *plans, *include, *(flag for folder in toolkit_include for flag in ("-isystem", folder))]
    commands += [[*cxx, *CXXFLAGS, *includes, "-c", str(source), "-o", str(temp / f"{source.stem}.o")] for source in bindings]
    commands.append(build_info(cxx, temp, *includes, f'-DSYNCBN_CUDA_ARCHS="{names}"'))
    if not (torch_folder() / "lib/libtorch_cuda.so").exists():
        # An empty stand-in: the library must list libtorch_cuda.so as a dependency even if this torch has none.
        run([*cxx, "-shared", "-Wl,-soname,libtorch_cuda.so", "-o", str(temp / "libtorch_cuda.so"), "-x", "c++", os.devnull])
    folders = [f"-L{folder}" for folder in [temp, *toolkit_lib]]
    runtime = ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    return commands, [*cxx, "-shared", *link, *folders, "-Wl,--no-as-needed", "-ltorch_cuda", *runtime]


def other_plans() -> list[Path]:
    """The header that SYNCBN_PLANS names in place of the Plans in csrc/cuda/plans.cuh, if any."""
    name = os.environ.get("SYNCBN_PLANS")
    return [Path(name).resolve()] if name else []


def architectures(nvcc: list[str]) -> tuple[list[str], str]:
    """(nvcc's flags, the architectures' names as native.py reads them)."""
    wanted = re.findall(r"[^;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if not wanted:
        known = subprocess.run([*nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        wanted = [name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in known]
        if not wanted:
            raise CannotBuild(f"nvcc knows none of {ARCHITECTURES}: set TORCH_CUDA_ARCH_LIST")
        wanted[-1] += "+PTX"
    flags, names = [], []
    for name in wanted:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST must be numbers such as 8.0;9.0+PTX, got {name!r}")
        number = name.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}"] + ([f"compute_{number}"] if name.endswith("+PTX") else [])
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
        names.append(name.replace(".", ""))
    return flags, " ".join(names)


class BuildLibraries(build_ext):
    """Plain shared libraries instead of Python modules."""

    def run(self) -> None:
        self.built: list[str] = []
        self.next_to_sources = self.inplace or self.editable_mode  # setuptools copies libraries there afterwards
        super().run()
        if not self.built:
            print("syncbn: nothing is compiled in this build, plain Python for any platform", file=sys.stderr)
            self.distribution.ext_modules = []

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        in_source = Path(self.get_ext_filename(ext.name))
        places = [target, *([in_source] if self.next_to_sources else [])]
        # Remove the old libraries: if this build leaves one out, an older one must not take its place.
        for old in (*places, *(place.with_suffix(REASON) for place in places)):
            old.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if os.environ.get(SWITCHES[ext.name]) == "0":
                raise CannotBuild(f"{SWITCHES[ext.name]} was 0")
            compile_and_link(target, COMMANDS[ext.name])
            self.built.append(ext.name)
        except NoTorch as reason:
            sys.exit(f"syncbn: {target.name} is not built: {reason}")
        except CannotBuild as reason:
            for place in places:
                place.with_suffix(REASON).write_text(str(reason))
            print(f"syncbn: {target.name} is not built: {reason}", file=sys.stderr)
            raise CompileError(str(reason)) from None


def compile_and_link(target: Path, commands_of: Callable[[Path], tuple[list[list[str]], list[str]]]) -> None:
    temp = Path("build/objects").resolve() / target.stem  # for an editable install and a wheel alike
    temp.mkdir(parents=True, exist_ok=True)
    commands, link = commands_of(temp)
    commands = [[*command[:-1], named_by_its_command(command)] for command in commands]
    stale = [command for command in commands if is_stale(command)]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(lambda command: run([*command[:-2], "-MMD", *command[-2:]]), stale))  # -MMD: see dependencies
    # Objects first: the linker resolves symbols only for inputs listed before a library.
    at = link.index("-shared") + 1
    run([*link[:at], "-o", str(target), *(command[-1] for command in commands), *link[at:]])


def is_stale(command: list[str]) -> bool:
    """Whether an object is missing, or older than what it is made of. Its name holds what else matters: flags and compiler."""
    made = Path(command[-1])
    needed = [*dependencies(made, Path(command[command.index("-c") + 1])), torch_folder() / "version.py"]  # which is as new as torch
    return not made.exists() or any(not path.exists() or path.stat().st_mtime > made.stat().st_mtime for path in needed)


def dependencies(made: Path, source: Path) -> list[Path]:
    """The source of an object and the headers that it includes, by the compiler's list; if there is none yet, all that it might include."""
    if made.with_suffix(".d").exists():
        return [Path(name) for name in made.with_suffix(".d").read_text().replace("\\\n", " ").partition(":")[2].split()]
    headers = [
        path
        for folder in {Path("csrc"), Path("csrc/bindings"), source.parent}
        for path in folder.iterdir()
        if path.suffix in (".h", ".cuh")
    ]
    return [source, *headers, *other_plans()]


def named_by_its_command(command: list[str]) -> str:
    """The object's path, with a digest: other flags or another compiler make another object."""
    path = Path(command[-1])
    return str(path.with_suffix(f".{hashlib.sha256(repr(command).encode()).hexdigest()[:12]}.o"))


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CannotBuild(f"`{' '.join(command)}` failed:\n{result.stdout}{result.stderr}")


class AnyPython(bdist_wheel):
    @property
    def root_is_pure(self) -> bool:
        """Whether the wheel is for any platform, which is known after the libraries have been built or left out."""
        return not self.distribution.has_ext_modules()

    @root_is_pure.setter
    def root_is_pure(self, _: bool) -> None:
        """Ignores the value, because setuptools sets it before the build."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


COMMANDS = {"syncbn.libsyncbn_cpu": cpu_commands, "syncbn.libsyncbn_cuda": cuda_commands}
SWITCHES = {"syncbn.libsyncbn_cpu": "SYNCBN_BUILD_CPU", "syncbn.libsyncbn_cuda": "SYNCBN_BUILD_CUDA"}
REASON = ".reason"  # suffix of the file next to the Python files that says why a library was not built

# optional: a library that cannot be built, or is turned off, is left out.
extensions = [Extension(name, [], optional=os.environ.get(switch) != "1") for name, switch in SWITCHES.items()]
setup(
    long_description=runpy.run_path("docs/long_description.py")["long_description"](),
    long_description_content_type="text/markdown",
    ext_modules=extensions if sys.platform == "linux" else [],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPython},
)
