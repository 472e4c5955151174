"""A finished run, and a Hub of its own for each test that asks for one."""

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import READER, STRANGER, TOKEN, HubServer
from training_runs import ROOT, settings, written
from transformers.utils.hub import hf_api

from equipoise.configuration import parse_run_settings
from equipoise.training import train


def run_script(name: str, *arguments: object) -> None:
    """A script of the house as `python scripts/NAME.py ARGUMENTS` would run it, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")


@pytest.fixture(scope="session")
def finished_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of twelve steps on two domains, evaluated and analysed. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("finished")
    run = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        train(parse_run_settings([written(folder, settings(corpus, run, max_validation_bytes_per_domain=20_000))]))
    run_script("evaluate_model", "--model", run)
    run_script("analyze", "--run", run, "--permutations", 20)
    return run


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    """A Hub of this test alone; for other processes, `hub_server.environment(...)` is what makes them use it."""
    with HubServer({TOKEN: "user", READER: "user", STRANGER: "other"}, readers=(READER,)) as server:
        yield server


@pytest.fixture
def hub(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubServer:
    """The same, used by this process as the user. (The client reads its environment once: its constants change.)"""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub_server.url)
    for shared in (huggingface_hub.hf_api.api, hf_api()):  # the clients that were made when the libraries were read
        monkeypatch.setattr(shared, "endpoint", hub_server.url)
    template = hub_server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub_server
