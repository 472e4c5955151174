"""The house: which room may import which, and names that must not collide."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

import equipoise

ROOT = Path(__file__).parents[1]

# Every room, and the rooms it may import. Nothing points back; siblings meet through files. `data` stands below
# training, evaluation and analysis because all three read documents and cut them into tokens.
ARROWS = {
    "configuration": set(),
    "balancing": {"configuration"},
    "data": {"configuration"},
    "modeling": {"balancing", "configuration"},
    "integrations": {"modeling", "balancing", "configuration"},
    "training": {"integrations", "modeling", "balancing", "data", "configuration"},
    "evaluation": {"modeling", "balancing", "data", "configuration"},
    "analysis": {"integrations", "modeling", "balancing", "data", "configuration"},
    "hub": {"integrations", "modeling", "balancing", "data", "configuration"},
    "scripts": {
        "hub",
        "training",
        "evaluation",
        "analysis",
        "integrations",
        "modeling",
        "balancing",
        "data",
        "configuration",
    },
}


def room_of(name: str) -> str:
    """The room of a dotted name: its own, or the one from which the front door takes it."""
    part = name.split(".")[1] if "." in name else ""
    if part in ARROWS:
        return part
    # `import equipoise` alone registers, and so loads, the models.
    return {"MoEConfig": "configuration", "": "modeling"}.get(part) or equipoise._LAZY.get(part, "modeling")


def imported_rooms(source: str, depth: int) -> set[str]:
    """The rooms that a source imports, however the import is written.

    Args:
        depth: folders between the root and the file; an import with more dots than that starts at the root.
    """
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.level > depth or node.level == 0):
            module = ("equipoise." if node.level else "") + (node.module or "")
            if module.rstrip(".") == "equipoise":
                names += [f"equipoise.{alias.name}" for alias in node.names]
            else:
                names.append(module)
    return {room_of(name) for name in names if name.split(".")[0] == "equipoise"}


@pytest.mark.parametrize(
    ("line", "rooms"),
    [
        ("from ..training import loop", {"training"}),
        ("from ..training.loop import train", {"training"}),
        ("from .. import training", {"training"}),
        ("from equipoise import training", {"training"}),
        ("from equipoise import MoEForCausalLM", {"modeling"}),
        ("from equipoise import Balancer, MoEConfig", {"balancing", "configuration"}),
        ("import equipoise", {"modeling"}),
        ("import equipoise.data.order as order", {"data"}),
        ("def later():\n    from ..data import windows", {"data"}),
        ("from .losses import router_z_loss\nimport torch\nimport equipoisely", set()),
    ],
)
def test_imports_are_seen_however_they_are_written(line: str, rooms: set[str]) -> None:
    assert imported_rooms(line, depth=1) == rooms


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_imports_follow_the_arrows(room: str) -> None:
    for file in sorted((ROOT / room).rglob("*.py")):
        depth = len(file.relative_to(ROOT).parts) - 1
        forbidden = imported_rooms(file.read_text(encoding="utf-8"), depth) - ARROWS[room] - {room}
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
