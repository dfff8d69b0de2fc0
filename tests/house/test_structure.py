"""Imports go one way, from floor to floor. Private names of torch stand in one file. Importing the package imports no optional dependency.
No untrusted data is executed."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import syncbn

pytestmark = pytest.mark.world_size(1)
PACKAGE = Path(syncbn.__file__).parent
# A module imports from its own floor or from an earlier line of this list (a lower floor). A folder's name covers all its modules that are
# not listed themselves.
FLOORS = {
    "torch, the machine and memory": "_torch_private environment layout activation moments build_info gpus native",
    "communication": "comm",
    "the ops": "reference ops",
    "the layer's arithmetic": "options arguments recompute checkpoint double_backward autograd functional",
    "what a layer needs": "keras_weights guards surgery.__init__ surgery.record surgery.tails surgery.encapsulation surgery.trace",
    "the layers": "modules keras",
    "model surgery, and statistics of a whole pass": "surgery bn_stats",
    "training loops and tools": "join lightning check environment.__main__",
    "what users import": "__init__",
}
PLACES = {name: floor for floor, names in enumerate(FLOORS.values()) for name in names.split()}
# Imports inside functions, which lead to a higher floor, each with its reason.
UPWARD = {("modules", "surgery.convert"): "torch's users look for convert_sync_batchnorm on the class"}


def module_name(path: Path) -> str:
    """`functional`, `comm.mpi`, `comm.__init__`"""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, those inside functions as well, except those that only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from nodes(node)


def imports_of(name: str) -> set[str]:
    """The modules of the package that a module of it imports."""
    imported = set()
    package = name.split(".")[:-1]
    for node in nodes(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
            for alias in node.names:
                candidates = [".".join([*base, *end]) for end in ([alias.name], [alias.name, "__init__"], [], ["__init__"])]
                imported.add(next(candidate for candidate in candidates if candidate in FILES))
    return imported - {name}


def floor_of(name: str) -> int:
    assert name in PLACES or name.split(".")[0] in PLACES, f"{name} is on no floor"
    return PLACES[name] if name in PLACES else PLACES[name.split(".")[0]]


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
    for imported in imports_of(name):
        assert floor_of(imported) <= floor_of(name) or (name, imported) in UPWARD, f"{name} imports {imported}"


def test_there_is_no_circle_of_imports():
    graph = {name: imports_of(name) - {upper for lower, upper in UPWARD if lower == name} for name in FILES}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(FILES)  # a circle raises CycleError, which names it


def test_the_list_of_floors_names_what_there_is():
    missing = [name for name in PLACES if name not in FILES and f"{name}.__init__" not in FILES]
    assert missing == []
    assert all(upper in imports_of(lower) for lower, upper in UPWARD)


# ---- Private names of torch are in _torch_private.py only ----------------------------------------------------------------------------

# Methods that torch's modules call, and that our classes override.
OVERRIDDEN = {"_check_input_dim", "_load_from_state_dict"}
NOT_OF_TORCH = {"_fields", "_replace", "_getframe"}  # of NamedTuple, of sys
AS_TEXT = {"_modules"}  # in a list of the words that the source of a user's model may use


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None and not name.startswith("__")


def defined_in(tree: ast.AST) -> set[str]:
    """Names of functions, classes, attributes and variables that a file defines."""
    defined = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            defined.add(node.id if isinstance(node, ast.Name) else node.attr)
    return defined


def private_names_used(tree: ast.AST) -> set[str]:
    """Private names that a file imports from elsewhere, reads as an attribute or has as a text, as for getattr."""
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            used |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            used |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
            used |= set(node.value.split("."))
    return {name for name in used if is_private(name)}


TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
DEFINED = set.union(*(defined_in(tree) for name, tree in TREES.items() if name != "_torch_private"))


@pytest.mark.parametrize("name", [name for name in FILES if name != "_torch_private"])
def test_private_names_of_torch_are_in_one_file(name):
    assert private_names_used(TREES[name]) - DEFINED - OVERRIDDEN - NOT_OF_TORCH - AS_TEXT == set()


@pytest.mark.parametrize(
    "source",
    [
        "torch._C._current_graph_task_id()",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "import torch._dynamo",
        "from torch._subclasses.fake_tensor import FakeTensor",
        "module._parameters['weight']",
        "getattr(module, '_forward_hooks')",
        "'torch._dynamo' in sys.modules",
    ],
)
def test_a_private_name_would_be_noticed(source):
    assert private_names_used(ast.parse(source)) - DEFINED - OVERRIDDEN - NOT_OF_TORCH - AS_TEXT


def overridden(cls: Any) -> set[str]:
    """The private names of torch's classes that a class of ours defines again."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith("torch.")]
    return {name for name in vars(cls) if is_private(name) and name in DEFINED and any(hasattr(base, name) for base in bases)}


def test_no_other_private_method_of_torch_is_overridden():
    modules = [importlib.import_module(f"syncbn.{name}".removesuffix(".__init__")) for name in FILES if name != "comm.mpi"]
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    ours = [cls for cls in classes if cls.__module__.startswith("syncbn.")]
    assert set.union(*map(overridden, ours)) == OVERRIDDEN


def test_only_one_module_reads_the_environment():
    pattern = re.compile(r"\b(environ|getenv|putenv)\b")
    assert [name for name, path in FILES.items() if pattern.search(path.read_text())] == ["environment.__init__"]


def test_importing_the_package_imports_no_optional_dependency_and_no_compiler():
    """torch's compiler takes as long to import as the rest of torch."""
    code = "import sys, torch; before = set(sys.modules); import syncbn; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    packages = {name.split(".")[0] for name in modules}
    assert "syncbn" in packages and not modules & {"torch._dynamo", "sympy"}
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
    found = sorted(imported(source) & {"torch.load", "os.system", "os.popen"})  # then called without the module's name
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
