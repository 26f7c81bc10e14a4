"""The house: rooms import from rooms above them only, notebooks from earlier ones; what is in which room, and how long it is.

`python tests/unit/test_house.py` prints the rooms, the imports between them and the figures of style."""

import ast
import functools
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    "core",
    "data",
    "synthetic",
    "backbones",
    "components",
    "methods",
    "training",
    "evaluation",
    "figures",
    "inspection",
    "explore",
    "runs",
    "deploy",
    "cli",
)  # from the top: a room knows those above it
NOT_EXPORTED = ("experiments", "tutorials")
WIDTH = 120  # columns
FUNCTION = 60  # lines, those of its parameters among them
CLASS = 100  # lines; a longer one is built over several cells
LARGEST_ROOM = 0.20  # of the package's lines


@functools.cache
def modules() -> dict[str, Path]:
    "room.name -> file of every generated module."
    files = (ROOT / "zsad_nb").rglob("*.py")
    return {
        ".".join(p.relative_to(ROOT / "zsad_nb").with_suffix("").parts): p
        for p in sorted(files)
        if p.name not in ("__init__.py", "_modidx.py")
    }


def imports(path: Path, known) -> set[str]:
    "Modules of the package that a module imports, at its top or inside a function."
    package = ["zsad_nb", *path.relative_to(ROOT / "zsad_nb").parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("zsad_nb.") for name in found} & set(known)


@functools.cache
def graph() -> dict[str, set[str]]:
    "module -> modules that it imports."
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


@functools.cache
def place(module: str) -> tuple[int, str]:
    "Room and number of a module's notebook: where it stands in the order of reading."
    room, name = module.split(".")
    notebook = next(p for p in (ROOT / "nbs" / room).glob("*.ipynb") if p.stem[3:] == name)
    return ROOMS.index(room), notebook.name


def test_rooms_are_the_ones_of_the_list():
    folders = {
        p.parent.relative_to(ROOT / "nbs").as_posix()
        for p in (ROOT / "nbs").rglob("*.ipynb")
        if "." not in p.parent.name
    }
    assert folders == {*ROOMS, *NOT_EXPORTED}
    assert {name.split(".")[0] for name in modules()} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_notebooks_are_numbered(room):
    names = sorted(p.name for p in (ROOT / "nbs" / room).glob("*.ipynb"))
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", name) for name in names), "two digits and a name, no letters"
    numbers = [int(name[:2]) for name in names]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "in one row, none twice"
    assert room not in {name[3:-6] for name in names}, "a file does not repeat its room's name"


@pytest.mark.parametrize("module", modules())
def test_imports_point_backwards_only(module):
    "From rooms above, or from a notebook before it in the same room; so there is no circle either."
    later = [other for other in graph()[module] if place(other) > place(module)]
    assert not later, f"{module} imports {', '.join(later)}, which come after it"


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_no_room_is_too_large():
    count = Counter()
    for name, path in modules().items():
        count[name.split(".")[0]] += len(lines_of(path))
    largest, lines = count.most_common(1)[0]
    assert lines < LARGEST_ROOM * count.total(), f"{largest} has {lines} of {count.total()} lines"


def lengths(*kinds: type) -> dict[str, int]:
    "module:name -> lines of every function or class."
    return {
        f"{name}:{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, kinds)
    }


def style() -> dict:
    "Figures of the modules' text: lines, characters a line, share of long lines, long functions and classes."
    lines = [line for path in modules().values() for line in lines_of(path)]
    functions = lengths(ast.FunctionDef, ast.AsyncFunctionDef)
    classes = lengths(ast.ClassDef)
    return dict(
        modules=len(modules()),
        lines=len(lines),
        characters_a_line=sum(map(len, lines)) / len(lines),
        long_lines=sum(len(line) > WIDTH for line in lines) / len(lines),
        functions=len(functions),
        long_functions=sum(n > FUNCTION for n in functions.values()),
        classes=len(classes),
        long_classes=sum(n > CLASS for n in classes.values()),
    )


def test_style():
    figures = style()
    assert figures["long_lines"] <= 0.01, f"{figures['long_lines']:.1%} of the lines are longer than {WIDTH} columns"
    assert 34 <= figures["characters_a_line"] <= 47


@pytest.mark.parametrize(
    "limit, kinds", [(FUNCTION, (ast.FunctionDef, ast.AsyncFunctionDef)), (CLASS, (ast.ClassDef,))]
)
def test_length_of_functions_and_classes(limit, kinds):
    longer = {name: lines for name, lines in lengths(*kinds).items() if lines > limit}
    assert not longer, f"longer than {limit} lines: {longer}"


def exported(tree: ast.Module) -> set[str]:
    "Names in a module's `__all__`."
    lists = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return set(ast.literal_eval(lists[0])) if lists else set()


def public_functions(tree: ast.Module) -> dict[str, list[ast.arg]]:
    "name -> parameters of every exported function, and of every public method of an exported class (without self)."
    names = exported(tree)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in names:
            found |= {f"{node.name}.{f.name}": f for f in node.body if isinstance(f, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef) and any(ast.unparse(d).startswith("patch") for d in node.decorator_list):
            owner = ast.unparse(node.args.args[0].annotation)
            found |= {f"{owner}.{node.name}": node} if owner in names else {}
        elif isinstance(node, ast.FunctionDef) and node.name in names:
            found[node.name] = node
    out = {}
    for name, function in found.items():
        *owner, own = name.split(".")
        if own.startswith("_") and own not in ("__init__", "__call__"):
            continue
        static = any(ast.unparse(d) == "staticmethod" for d in function.decorator_list)
        places = [*function.args.posonlyargs, *function.args.args][1 if owner and not static else 0 :]
        out[name] = [*places, *function.args.kwonlyargs]
    return out


def test_public_parameters_have_hints():
    bare = [
        f"{module}.{name}({parameter.arg})"
        for module, path in modules().items()
        for name, parameters in public_functions(ast.parse(path.read_text(encoding="utf-8"))).items()
        for parameter in parameters
        if parameter.annotation is None
    ]
    assert not bare, f"{len(bare)} parameters without a hint: {', '.join(bare[:10])}"


def main():
    arrows = Counter()
    count = Counter()
    for name, others in graph().items():
        room = name.split(".")[0]
        count[room] += len(lines_of(modules()[name]))
        arrows.update((room, other.split(".")[0]) for other in others)
    for room in ROOMS:
        above = ", ".join(f"{other} {arrows[room, other]}" for other in ROOMS if other != room and arrows[room, other])
        print(f"{room:12} {count[room]:6} lines {count[room] / count.total():6.1%}   imports from: {above or '-'}")
    for key, value in style().items():
        print(f"{key:24} {value:.4g}" if isinstance(value, float) else f"{key:24} {value}")


if __name__ == "__main__":
    main()
