"""Imports go one way: a module imports only what stands before it in ORDER. Nothing heavy is imported unasked. No data of others is run as
code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import syncbn

pytestmark = pytest.mark.world_size(1)
PACKAGE = Path(syncbn.__file__).parent
ORDER = [
    "environment",
    "layout",
    "moments",
    "build_info",
    "gpus",
    "native",
    "comm.failures",
    "comm.shared_memory",
    "comm.meeting",
    "comm.identity",
    "comm.agreement",
    "comm.sharing",
    "comm.duplicates",
    "comm.sums",
    "comm.process_group",
    "comm.mpi",
    "comm.recorded",
    "comm",
    "comm.rendezvous",
    "comm.groups",
    "comm.exchange",
    "reference",
    "checkpoint",
    "ops",
    "double_backward",
    "arguments",
    "function",
    "keras_weights",
    "guards",
    "surgery",
    "surgery.record",
    "surgery.tails",
    "surgery.encapsulation",
    "surgery.trace",
    "modules",
    "keras",
    "surgery.fuse",
    "surgery.convert",
    "statistics",
    "surgery.fold",
    "join",
    "lightning",
    "check",
    "__init__",
]


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports at its top level, as names in ORDER."""
    found = set()
    package = path.parent.relative_to(PACKAGE).parts
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            base = list(package)[: len(package) - node.level + 1]
            if node.module:
                found.add(".".join([*base, node.module]))
            else:
                names = {".".join([*base, alias.name]) for alias in node.names}
                found |= {name if name in ORDER else ".".join(base) for name in names}
    return found


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_go_one_way(path):
    name = module_name(path)
    assert name in ORDER, f"{name} has no place in the order of modules"
    for imported in imports_of(path):
        assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"


def test_only_one_module_reads_the_environment():
    pattern = re.compile(r"\b(environ|getenv|putenv)\b")
    assert [module_name(path) for path in sorted(PACKAGE.rglob("*.py")) if pattern.search(path.read_text())] == ["environment"]


def test_importing_the_package_imports_no_optional_dependency():
    code = "import sys, torch; before = set(sys.modules); import syncbn; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages = {name.split(".")[0] for name in done.stdout.split()}
    assert "syncbn" in packages
    assert not packages & {"mpi4py", "tqdm", "matplotlib", "sklearn", "lightning", "pytest"}


def test_the_package_can_be_imported_where_there_is_no_unix():
    unix = "fcntl", "grp", "pwd", "resource", "syslog", "termios"
    code = f"import sys, torch; sys.modules.update(dict.fromkeys({unix})); import syncbn; print(syncbn.SyncBatchNorm(3))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{syncbn.SyncBatchNorm(3)}\n"), done.stderr


# ---- Nothing that comes over the wire or from a file is run as code ------------------------------------------------------------------

ROOT = PACKAGE.parent
SOURCES = [path for folder in ("syncbn", "examples", "launch", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
OBJECT_COLLECTIVES = "all_gather gather broadcast scatter send recv"  # of torch.distributed, with _object or _object_list
MPI_OBJECTS = (
    "send bsend ssend recv isend ibsend issend irecv sendrecv bcast gather scatter allgather alltoall reduce allreduce scan exscan"
)


def calls(source: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def imported(source: str) -> set[str]:
    """Dotted names: `import a.b` gives a.b, `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def pickles(source: str) -> list[str]:
    """What would send or receive pickles."""
    names = imported(source)
    found = sorted(name for name in names if name.split(".")[0] in PICKLERS)
    objects = {f"{verb}_object{end}" for verb in OBJECT_COLLECTIVES.split() for end in ("", "_list")}
    if any(name.startswith("mpi4py") for name in names):  # whose lower-case methods pickle
        objects |= set(MPI_OBJECTS.split())
    return found + [name for call in calls(source) if (name := ast.unparse(call.func).split(".")[-1]) in objects]


def runs_data(source: str) -> list[str]:
    """Calls that could run what they are given, or what is in a file, as code."""
    found = sorted(imported(source) & {"torch.load", "os.system", "os.popen"})  # under a name of their own
    for call in calls(source):
        name, keywords = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in ("eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"):
            found.append(name)
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append(ast.unparse(call))
        if keywords.get("shell", "False") != "False":
            found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_goes_over_the_wire(path):
    assert pickles(path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_data_is_run_as_code(path):
    assert runs_data(path.read_text()) == []


@pytest.mark.parametrize("path", sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")]), ids=lambda path: path.name)
def test_no_launcher_evaluates_its_arguments(path):
    for line in path.read_text().splitlines():
        assert not re.search(r"(^|[\s;&|(])eval\s|(bash|sh) -c\s", line.partition("#")[0]), line


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "dist.all_gather_object(out, x)",
        "torch.distributed.broadcast_object_list([x])",
        "from mpi4py import MPI\nMPI.COMM_WORLD.allgather(x)",
        "from mpi4py import MPI\nname = comm.bcast(name)",
    ],
)
def test_a_pickle_would_be_noticed(source):
    assert pickles(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "from torch import load",
        "eval(text)",
        "os.system('train ' + name)",
        "subprocess.run(f'train {name}', shell=True)",
        "subprocess.Popen(command, shell=quick)",
    ],
)
def test_data_run_as_code_would_be_noticed(source):
    assert runs_data(source)
    assert not runs_data("torch.load(path, weights_only=True); model.eval(); subprocess.run(['train', name])")
