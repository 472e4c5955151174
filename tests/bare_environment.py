"""A virtual environment that holds torch, Transformers and what these require, and nothing else."""

import re
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement


def required(names: tuple[str, ...]) -> set[str]:
    """These distributions and all that they require, by name."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        found.add(name)
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(requirement.name)
    return found


def make_bare_environment(folder: Path) -> Path:
    """Links what is installed here instead of installing it again; returns the environment's interpreter."""
    venv.create(folder, symlinks=True)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for name in required(("torch", "transformers")):
        files = distribution(name).files
        assert files is not None, name
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            link = packages / top
            if not link.exists():
                link.symlink_to(Path(str(distribution(name).locate_file(top))))
    return folder / "bin" / "python"
