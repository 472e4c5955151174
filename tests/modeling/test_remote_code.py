"""The code travels with the weights: it is used where equipoise is not installed, and left alone where it is."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import equipoise
from equipoise import MoEConfig, MoEForCausalLM
from equipoise.configuration.remote_code import AUTO_MAP, MODULES, write_remote_code
from tests.modeling.use_remote_code import use

Make = Callable[..., MoEConfig]
ROOT = Path(__file__).parents[2]
IDS = torch.arange(2, 26).reshape(2, 12)
MODES = {
    "global_batch": {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1},
    "loss_free": {"scoring_func": "sigmoid", "bias_update_rate": 0.01},
}


def made(config: MoEConfig) -> MoEForCausalLM:
    torch.manual_seed(0)
    model = MoEForCausalLM(config)
    for bias in model.selection_biases():
        bias.normal_(std=0.1)
    return model


def run_bare(bare_python: Path, folder: Path, scratch: Path) -> dict:
    """What `use_remote_code` finds in an environment without equipoise, from a folder outside the repository."""
    home = scratch / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [
            str(bare_python),
            str(ROOT / "tests/modeling/use_remote_code.py"),
            folder,
            scratch / "used.pt",
            scratch / "again",
        ],
        cwd=home,
        env=environment | {"HF_HOME": str(home)},
        check=True,
        capture_output=True,
        text=True,
    )
    return torch.load(scratch / "used.pt", weights_only=True)


@pytest.mark.parametrize("mode", MODES)
def test_torch_and_transformers_are_enough(tiny_config: Make, bare_python: Path, tmp_path: Path, mode: str) -> None:
    """Logits, generation, a step of training with balancing, and a copy that is saved again."""
    model = made(tiny_config(balancing_mode=mode, **MODES[mode]))
    model.save_pretrained(tmp_path / "model")
    got = run_bare(bare_python, tmp_path / "model", tmp_path)
    # Loaded, too: weights that are read from a file are aligned otherwise, and products then round otherwise.
    expected = use(MoEForCausalLM.from_pretrained(tmp_path / "model"), IDS)
    for name in ("generated", "load", "biases"):
        assert torch.equal(got[name], expected[name]), name
    for name in ("logits", "loss", "aux_loss"):
        torch.testing.assert_close(got[name], expected[name], atol=1e-6, rtol=1e-5)
    assert got["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(got["gradients"][name], gradient, atol=1e-6, rtol=1e-5)

    (tmp_path / "second").mkdir()
    for module in MODULES:
        name = Path(module).name
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name
    assert json.loads((tmp_path / "again/config.json").read_text())["auto_map"] == AUTO_MAP
    second = run_bare(bare_python, tmp_path / "again", tmp_path / "second")
    moved = MoEForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(second["logits"], moved.eval()(IDS).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("trust", [True, False, None])
def test_installed_classes_win(tiny_config: Make, tmp_path: Path, trust: bool | None) -> None:
    made(tiny_config()).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
    assert type(model) is MoEForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)) is MoEConfig


def test_flat_files_import_one_another_and_nothing_else_of_equipoise(tiny_config: Make, tmp_path: Path) -> None:
    """A module forgotten in the list, or a whole room imported, shows only where equipoise is not installed."""
    made(tiny_config()).save_pretrained(tmp_path)
    files = {path.stem: path.read_text() for path in tmp_path.glob("*.py")}
    assert len(files) == len(MODULES) == len({Path(module).name for module in MODULES})
    reached, left = set(), ["modeling_moe"]
    while left:
        name = left.pop()
        reached.add(name)
        imports = re.findall(r"^\s*(?:from|import) +(\.+\S*|equipoise\S*)", files[name], flags=re.M)
        assert all(re.fullmatch(r"\.\w+", imported) for imported in imports), (name, imports)
        left += [imported[1:] for imported in imports if imported[1:] not in reached]
    assert reached == set(files)


def test_the_object_s_configuration_stays_as_it_was(tiny_config: Make, tmp_path: Path) -> None:
    """A configuration saved alone carries no code, before a model was saved and after."""
    model = made(tiny_config())
    model.save_pretrained(tmp_path / "model")
    model.config.save_pretrained(tmp_path / "config")
    assert [path.name for path in (tmp_path / "config").iterdir()] == ["config.json"]
    assert "auto_map" not in json.loads((tmp_path / "config/config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded.save_pretrained(tmp_path / "again")
    assert loaded.config.auto_map == AUTO_MAP


def test_a_model_of_an_older_version_is_brought_up_to_date(tiny_config: Make, tmp_path: Path) -> None:
    made(tiny_config()).save_pretrained(tmp_path)
    expected = {path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix in (".py", ".json")}
    config = json.loads(expected["config.json"])
    del config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "router.py").write_text("old")
    (tmp_path / "losses.py").unlink()
    write_remote_code(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.name in expected} == expected


def test_every_auto_class_that_is_registered_is_in_the_map() -> None:
    """`from_pretrained` of an Auto class that is not in it fails where equipoise is not installed."""
    heads = {name for name in equipoise.__all__ if name.startswith("MoE") and name != "MoEPreTrainedModel"}
    assert {reference.split(".")[1] for reference in AUTO_MAP.values()} == heads
