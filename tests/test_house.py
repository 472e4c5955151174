"""The house: which room may import which, and names that must not collide."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Every room, and the rooms it may import. Nothing points back; siblings meet through files.
ARROWS = {
    "configuration": set(),
    "balancing": {"configuration"},
    "data": {"configuration"},
    "modeling": {"balancing", "configuration"},
    "training": {"modeling", "balancing", "data", "configuration"},
    "evaluation": {"modeling", "balancing", "data", "configuration"},
    "analysis": {"modeling", "balancing", "data", "configuration"},
    "scripts": {"training", "evaluation", "analysis", "modeling", "balancing", "data", "configuration"},
}


def imported_rooms(file: Path) -> set[str]:
    """The rooms that one source file imports, however the import is written."""
    depth = len(file.relative_to(ROOT).parts) - 1  # `.` is the file's own room, one more dot the root
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level > depth:
            names = [f"equipoise.{node.module or ''}"]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("equipoise.")}
    return rooms & set(ARROWS)


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_imports_follow_the_arrows(room: str) -> None:
    for file in sorted((ROOT / room).rglob("*.py")):
        forbidden = imported_rooms(file) - ARROWS[room] - {room}
        assert not forbidden, f"{file.relative_to(ROOT)} imports {sorted(forbidden)}; {room} may not"


def test_every_package_folder_is_a_room() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages | {"scripts"} == set(ARROWS)


def test_setup_lists_every_package() -> None:
    listed = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    for room in set(ARROWS) - {"scripts"}:
        assert f"    equipoise.{room}\n" in listed, f"setup.cfg does not list equipoise.{room}"


def test_no_script_shadows_an_importable_package() -> None:
    # Python puts a script's folder first on sys.path: scripts/evaluate.py would hide the `evaluate` library.
    for script in (ROOT / "scripts").glob("*.py"):
        spec = find_spec(script.stem)
        assert spec is None or Path(spec.origin or "").parent == script.parent, f"{script.name} shadows {spec}"


def test_configuration_needs_no_torch() -> None:
    for file in (ROOT / "configuration").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not any(name.split(".")[0] == "torch" for name in modules), f"{file.name} imports torch"
