"""The arrows between the rooms, and what no room may do."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "selfinstruct"

ARROWS: dict[str, set[str]] = {
    "records": set(),
    "errors": set(),
    "durable": set(),
    "config_file": {"errors"},
    "config": {"records", "errors", "durable", "config_file"},
    "seeds": {"records", "errors"},
    "languages": {"records", "errors"},
    "novelty": {"records", "errors"},
    "quality": {"records", "languages", "novelty"},
    "methods": {"records", "errors", "languages"},
    "backends": {"records", "errors", "config"},
    "servers": {"records", "errors", "config", "backends"},
    "run": {
        "records",
        "errors",
        "durable",
        "config",
        "seeds",
        "languages",
        "novelty",
        "quality",
        "methods",
        "backends",
        "servers",
    },
    "dataset": {"records", "errors", "durable", "novelty", "quality", "run"},
    "student": {"records", "errors", "durable", "config", "backends", "servers", "dataset"},
    "__init__": {"dataset"},
}
# The rooms within the student's; "" are the modules that stand in none.
STUDENT: dict[str, set[str]] = {
    "": set(),
    "models": {""},
    "train": {"", "models"},
    "infer": {"", "models"},
    "serve": {"", "models", "infer"},
}
ONLY_THE_JOURNAL = {"dataset"}  # of the run, the dataset knows the journal and nothing else

FORBIDDEN = {
    r"trust_remote_code\s*=\s*True": "code of strangers",
    r"\bimport pickle\b|\bpickle\.loads?\(|\btorch\.load\(": "pickles run code",
    r"yaml\.(unsafe_|full_)?load\(": "use yaml.safe_load",
    r"shell\s*=\s*True": "shells read file names as commands",
    r"verify\s*=\s*False": "TLS is checked",
    r"0\.0\.0\.0": "servers listen on loopback",
    r"(?<![\w.])(eval|exec)\(": "text is never code",
}


def _needs(path: Path) -> set[str]:
    """The modules of the package that a module imports, by their dotted names."""
    known = {".".join(module.relative_to(PACKAGE).with_suffix("").parts) for module in _modules()}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module and node.module.split(".")[0] == "selfinstruct":
                module = node.module.partition(".")[2]
                names = {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
                found |= ({module} | names) & known
    return found


def test_no_module_needs_itself() -> None:
    needs = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): _needs(path) for path in _modules()}
    left = dict(needs)
    while ready := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in ready:
            del left[name]
    assert not left, f"these import each other, or what does: {sorted(left)}"


def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "selfinstruct":
            below = node.module.split(".")[1:]
            found |= {".".join(below)} if below else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "selfinstruct"}
    return found


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_one_way(path: Path) -> None:
    room = _room(path)
    for module in _imports(path):
        target = module.split(".")[0]
        if target in (room, "") or room in ("cli", "__main__"):
            continue
        assert target != "cli", f"{path.name} imports the commands; nothing does: move the code out of cli/"
        assert target in ARROWS[room], (
            f"{room}/ must not import {target}/ (in {path.name}): put what both need into a room that {room}/ may "
            f"import ({', '.join(sorted(ARROWS[room])) or 'none'})"
        )
        if room in ONLY_THE_JOURNAL and target == "run":
            assert module == "run.journal", f"{path.name}: of the run, {room}/ may know the journal alone"


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "student").rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE / "student"))
)
def test_arrows_within_the_student_point_one_way(path: Path) -> None:
    def room_of(parts: tuple[str, ...]) -> str:
        return parts[0] if parts and parts[0] in STUDENT else ""

    room = room_of(path.relative_to(PACKAGE / "student").parts)
    for module in _needs(path):
        if module.startswith("student."):
            target = room_of(tuple(module.split(".")[1:]))
            assert target == room or target in STUDENT[room], (
                f"student/{room} must not import {module} (in {path.name})"
            )


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 300, f"{path.name} has more than one responsibility by now: split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 60, f"{path.name}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_dangerous_is_written(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for pattern, why in FORBIDDEN.items():
        found = re.search(pattern, text)
        assert found is None, f"{path.name}: {found and found[0]!r}: {why}"


def test_no_module_is_called_after_nothing() -> None:
    empty = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [path for path in _modules() if path.stem in empty]
