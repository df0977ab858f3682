"""The library's rooms: imports point downwards only, and the core needs nothing above it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tinysteer

PACKAGE = Path(tinysteer.__file__).parent
CORE = ("text", "model", "loading", "steering", "decoding", "language_model", "extraction")
ROOMS = (  # from below; none imports one that is behind it here
    "version",
    *CORE,
    "evaluation",
    "demo",
    "experiments",
    "inspection",
    "specs",
    "cli",
    "__main__",
)
FRONT = "__init__"  # the front door: the core's public names


def modules() -> dict[str, Path]:
    """Every module of the library by its dotted name, `tinysteer` left out."""
    files = {file.relative_to(PACKAGE).with_suffix(""): file for file in PACKAGE.rglob("*.py")}
    return {".".join(name.parts): file for name, file in files.items()}


def imports(file: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it: dotted, `tinysteer` left out."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: {ast.unparse(node)} is relative"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    known, found = modules(), set()
    for name in names:
        head, _, rest = name.partition(".")
        while head == "tinysteer" and rest:
            if rest in known or f"{rest}.__init__" in known:
                found.add(rest)
                break
            rest = rest.rpartition(".")[0]
        else:
            assert head != "tinysteer", f"{file} imports {name} from the front door"
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_lives_in_a_room():
    assert {room(name) for name in modules()} == {*ROOMS, FRONT}


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_room_imports_only_rooms_below_it(name):
    allowed = (*CORE, "version") if name == FRONT else ROOMS[: ROOMS.index(room(name)) + 1]
    assert {room(other) for other in imports(modules()[name])} <= {*allowed}


def test_no_modules_import_each_other():
    graph = {name.removesuffix(".__init__"): imports(file) for name, file in modules().items()}
    while free := {name for name, needs in graph.items() if not needs & graph.keys() - {name}}:
        graph = {name: needs for name, needs in graph.items() if name not in free}
    assert not graph, f"these wait for each other: {sorted(graph)}"


def test_the_kernels_import_nothing_of_the_library():
    folder = PACKAGE.parent / "kernels/tinysteer_kernels"
    assert folder.is_dir()
    said = "\n".join(file.read_text(encoding="utf-8") for file in folder.rglob("*.py"))
    assert "def steer(" in said
    assert not re.findall(r"^\s*(?:from|import) tinysteer\b", said, re.MULTILINE)


def test_the_core_works_with_the_rest_out_of_reach():
    """As for somebody who vendors the core: a vector extracted, saved, loaded and steered by."""
    study = [name for name in ROOMS if name not in (*CORE, "version")]
    code = f"""
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[:2] in {[["tinysteer", name] for name in study]}:
            raise ImportError(f"{{name}} was left out")

sys.meta_path.insert(0, Absent())
import tinysteer as ts
model = ts.load()
vector = ts.extract(model, ["What is an owl? Answer in all capital letters."], ["What is an owl?"])
print(len(model.complete(["What is a fox?"], [vector.at(3).add()], max_new_tokens=4)))
try:
    import tinysteer.evaluation
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "1\ntinysteer.evaluation was left out\n", run.stderr
