"""The house plan, held to by its imports: every one points down, and what should cost nothing costs nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tfcli

PACKAGE = Path(tfcli.__file__).parent
FLOORS = {
    "errors": 0,
    "config": 1,
    "disk": 1,
    "native": 1,
    "runtime": 2,
    "text": 3,
    "model": 3,
    "formats": 4,
    "infer": 5,
    "tasks": 6,
    "objectives": 7,
    "train": 8,
    "compression": 9,
    "inspection": 9,
    "benchmark": 9,
    "apply": 9,
    "cli": 10,
    "__main__": 11,
}
"""Room: floor. A module imports from lower floors, or from its own room without a circle."""
SMALL_ROOMS = {
    "text": [["read"], ["tokenizers"], ["chat", "corpus"]],
    "model": [["quant"]],
    "formats": [["hf"], ["gguf"]],
    "tasks": [["common"], ["lm"], ["classify", "tag", "answer", "translate", "chat"]],
}
"""{room: its small rooms, by floors from below}. Rooms of one floor do not import each other; files that lie beside
the rooms may be anywhere among them, as long as no circle comes of it."""
FACE = "tfcli"
"""tfcli/__init__.py is the library's face: it imports on first use, from wherever."""


def modules() -> dict[str, Path]:
    """{dotted name: file} of the whole package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(module, line, whether only for types) of every import in a file, those inside functions as well."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in for_types
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module), node.lineno, id(node) in for_types


def room(module: str) -> str:
    return module.split(".")[1]


def inner() -> list[tuple[str, str, int]]:
    """(importer, imported, line) of every import from the package to the package, its face apart."""
    return [
        (name, target, line)
        for name, path in MODULES.items()
        if name != FACE
        for target, line, _ in imports(path)
        if target.split(".")[0] == "tfcli" and target != FACE
    ]


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in MODULES if name != FACE} <= FLOORS.keys()


def test_imports_point_down() -> None:
    wrong = [
        f"{name}:{line} imports {target}"
        for name, target, line in inner()
        if room(name) != room(target) and FLOORS[room(target)] >= FLOORS[room(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_small_rooms_point_down() -> None:
    wrong = []
    for name, target, line in inner():
        here, there = name.split(".")[1:3], target.split(".")[1:3]
        if here[0] != there[0] or here == there:
            continue
        floor = {small: at for at, rooms in enumerate(SMALL_ROOMS.get(here[0], [])) for small in rooms}
        small = len(here) == len(there) == 2 and here[1] in floor and there[1] in floor
        if small and floor[there[1]] >= floor[here[1]]:
            wrong.append(f"{name}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_every_folder_is_a_small_room() -> None:
    found = {
        (path.parent.name, path.name)
        for path in PACKAGE.glob("*/*/")
        if (path / "__init__.py").exists() and path.parent.name in FLOORS
    }
    known = {(room, small) for room, floors in SMALL_ROOMS.items() for rooms in floors for small in rooms}
    assert found == known


def test_no_circles() -> None:
    # Imports for types count too: a circle that only the type checker sees is still one in the reader's head.
    edges: dict[str, set[str]] = {name: set() for name in MODULES}
    for name, target, _ in inner():
        if name != target:
            edges[name].add(target)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_only_the_command_line_knows_typer_and_rich() -> None:
    wrong = [
        f"{name}:{line} imports {target}"
        for name, path in MODULES.items()
        for target, line, _ in imports(path)
        if target.split(".")[0] in ("typer", "rich", "click")
        and (name == FACE or room(name) != "cli" or "click" in target)
    ]
    assert not wrong, "\n".join(wrong)


def test_text_never_imports_torch_even_for_types() -> None:
    wrong = [
        f"{name}:{line}"
        for name, path in MODULES.items()
        if name.startswith(("tfcli.text", "tfcli.config", "tfcli.errors", "tfcli.model.cost"))
        for target, line, _ in imports(path)
        if target.split(".")[0] == "torch"
    ]
    assert not wrong, "\n".join(wrong)


def test_commands_import_at_the_top_only_what_help_needs() -> None:
    allowed = {
        "typer",
        "typer.core",
        "typer.main",
        "tfcli.errors",
        "tfcli.objectives.table",
        "tfcli.tasks.applications",
    }
    settings = re.compile(r"tfcli\.tasks\.[a-z]+\.options")  # whose defaults help shows
    wrong = []
    for name, path in MODULES.items():
        if not name.startswith("tfcli.cli."):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = {node.lineno for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
        for target, line, _ in imports(path):
            known = (
                target in allowed
                or settings.fullmatch(target)
                or target.split(".")[0] in sys.stdlib_module_names
                or target.startswith(("tfcli.cli", "tfcli.config", "tfcli.disk"))
            )
            if line in top and not known:
                wrong.append(f"{name}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_commands_compute_nothing() -> None:
    """They parse, call a function of the library and render: numbers and temporary files are for those below."""
    wrong = [
        f"{name}:{line} imports {target}"
        for name, path in MODULES.items()
        if name.startswith("tfcli.cli.")
        for target, line, _ in imports(path)
        if target.split(".")[0] in ("torch", "numpy", "tempfile") or target.startswith(("tfcli.model", "tfcli.native"))
    ]
    assert not wrong, "\n".join(wrong)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_text_runs_without_torch() -> None:
    names = [name for name in MODULES if name.startswith("tfcli.text")]
    assert run_python(f"import sys, {', '.join(names)}; print('torch' in sys.modules)") == "False\n"


def test_importing_the_library_costs_nothing() -> None:
    heavy = "{'torch', 'numpy', 'sentencepiece', 'typer', 'rich', 'datasets', 'transformers'}"
    assert run_python(f"import sys, tfcli; print(sorted({heavy} & set(sys.modules)))") == "[]\n"


HELP = """
import contextlib, io, sys
from tfcli.cli.main import build, main
import typer.main
application = build()
commands = [[]]
def walk(command, path):
    for name in getattr(command, "list_commands", lambda ctx: [])(None):
        commands.append([*path, name])
        walk(command.get_command(None, name), [*path, name])
walk(typer.main.get_command(application) if isinstance(application, typer.Typer) else application, [])
assert len(commands) > 6, commands
for path in commands:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([*path, "--help"])
    assert code == 0, (path, code)
    assert "Usage" in out.getvalue(), path
    heavy = {"torch", "numpy", "sentencepiece", "datasets", "transformers"} & set(sys.modules)
    assert not heavy, (path, heavy)
print(len(commands))
"""


def test_help_imports_nothing_heavy() -> None:
    assert int(run_python(HELP)) > 6


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_says_what_it_is(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree)
    assert not tree.body or (docstring and docstring.splitlines()[0].endswith((".", ":"))), name


def test_no_module_runs_work_at_import() -> None:
    # Of statements at the top only these: imports, definitions, assignments, docstrings, and the main guard.
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    wrong = []
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guard = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
            registers = name.startswith("tfcli.cli.") and isinstance(node, ast.Expr)  # app.command(...)(function)
            if not (isinstance(node, allowed) or text or guard or registers):
                wrong.append(f"{name}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def probes() -> Iterator[str]:
    """Find members looked up by a literal name, on our own objects or, in ``cli``, on results of tasks."""
    rooms, made = ("tasks", "objectives", "train", "apply"), {"task", "app", "application", "predictor", "objective"}
    for name, path in MODULES.items():
        if name == FACE or room(name) not in (*rooms, "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr")):
                continue
            on, member = node.args[:2]
            ours = room(name) in rooms or ast.unparse(on).rpartition(".")[2] in made
            if isinstance(member, ast.Constant) and ours:
                yield f"{name}:{node.lineno} {ast.unparse(node)}"


def test_nothing_is_looked_for_on_a_task() -> None:
    """The contracts are whole in tfcli/tasks/task.py and tfcli/objectives/base.py, with defaults."""
    assert not list(probes())


def test_the_trainer_tests_no_types() -> None:
    tree = ast.parse(MODULES["tfcli.train.trainer"].read_text(encoding="utf-8"))
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "isinstance"]


def test_every_folder_of_a_task_has_its_name() -> None:
    from tfcli.tasks.applications import APPLICATIONS

    folders = {path.name for path in (PACKAGE / "tasks").iterdir() if (path / "__init__.py").exists()}
    assert folders - {"common"} == APPLICATIONS.keys()
    for name, line in APPLICATIONS.items():
        assert line.module == f"tfcli.tasks.{name}.task"


def test_no_branch_on_the_name_of_an_objective() -> None:
    """A fifth objective is a file and a line: nothing compares the word after --arch."""
    wrong = [
        f"{name}:{node.lineno} {ast.unparse(node)}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare)
        and any(isinstance(each, ast.Attribute | ast.Name) and ast.unparse(each).split(".")[-1] == "arch"
                for each in (node.left, *node.comparators))
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)
