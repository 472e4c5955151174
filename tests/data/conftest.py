"""Registries of packages without a network."""

from pathlib import Path

import pytest

from equipoise.data import registries
from tests.data.packages import FakeRegistries


@pytest.fixture
def fake_registries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRegistries:
    """Empty registries, asked by clients that stand in for apt, npm and pip."""
    fake = FakeRegistries(tmp_path / "registries")
    for registry in ("apt", "npm", "pip"):
        monkeypatch.setitem(registries.CLIENTS, registry, fake.client(registry))
    return fake
