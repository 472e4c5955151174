"""Publishing over HTTP: the real client of the Hub against a server that speaks its protocol."""

import hashlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_server import READER, STRANGER, TOKEN, HubServer
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from training_runs import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from equipoise import MoEForCausalLM
from equipoise.hub import publishing
from equipoise.hub.publishing import PublishingError, assemble, link_or_copy, push, symlink

SCRIPT = ROOT / "scripts" / "publish.py"
TEXT = "def quicksort(x):"


def publish(*arguments: object) -> str:
    """The script with these arguments, in this process; returns what it printed. Errors are raised as they are."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(out):
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return out.getvalue()


def refused(*arguments: object) -> str:
    """Why the script ended."""
    with pytest.raises(SystemExit) as stopped:
        publish(*arguments)
    return str(stopped.value.code)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def wait_until(seconds: float, condition: Callable[[], object]) -> None:
    """Waits until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, its model in shards."""
    folder = tmp_path_factory.mktemp("published") / "run"
    shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    model = MoEForCausalLM.from_pretrained(folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    model.save_pretrained(folder / "model", max_shard_size="80KB")
    analysis = folder / "analysis" / "analysis.json"  # of the model that lies here
    analysis.write_text(analysis.read_text().replace(str(finished_run), str(folder)))
    assert len(list((folder / "model").glob("model-*.safetensors"))) >= 3
    return folder


@pytest.fixture
def assembled(run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "assembled"
    folder.mkdir()
    assemble(folder, run / "model", name="user/mine", place=symlink, run=run)
    return folder


def shards(folder: Path) -> dict[str, str]:
    """Name -> SHA-256"""
    return {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}


# --- pushed, and loaded by others ---

LOAD = """
import json, torch
from importlib.util import find_spec
assert find_spec("equipoise") is None
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
model = AutoModelForCausalLM.from_pretrained("user/mine", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("user/mine", trust_remote_code=True)
generation = GenerationConfig.from_pretrained("user/mine")
inputs = tokenizer({text!r}, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
print(json.dumps([type(model).__module__, inputs["input_ids"].tolist(), logits.tolist(), generation.eos_token_id]))
"""


def test_what_was_pushed_is_loaded_without_equipoise(
    run: Path, hub: HubServer, bare_python: Path, tmp_path: Path
) -> None:
    said = publish("--run", run, "--repo", "user/mine", "--license", "apache-2.0", "--languages", "en")
    assert hub.url in said
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [str(bare_python), "-I", "-c", LOAD.format(text=TEXT)],
        env=os.environ | hub.environment(home) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=home,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    module, input_ids, logits, eos_token_id = json.loads(done.stdout)
    assert module.startswith("transformers_modules.user.mine.")
    expected_ids, expected = logits_of(run / "model")
    assert input_ids == expected_ids.tolist()
    # It has one thread, this process as many as it likes: products round otherwise.
    torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=1e-5)
    assert eos_token_id == GenerationConfig.from_pretrained(run / "model").eos_token_id
    # The stranger had no token, and storage, another host, is never told one.
    assert {request.token for request in hub.asked("GET", "resolve|storage")} == {None}
    assert {request.token for request in hub.asked("PUT", "storage")} == {None}


def test_what_was_pushed_is_loaded_with_equipoise(
    run: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("--run", run, "--repo", "user/mine")
    monkeypatch.delenv("HF_TOKEN")
    input_ids, logits = logits_of("user/mine", cache_dir=tmp_path / "hub")
    expected_ids, expected = logits_of(run / "model")
    assert torch.equal(input_ids, expected_ids)
    assert torch.equal(logits, expected)
    assert {request.token for request in hub.asked("GET", "resolve|storage")} == {None}


def logits_of(name: str | Path, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model of this package makes of a text; the text's ids and the logits."""
    model = AutoModelForCausalLM.from_pretrained(name, **arguments)
    assert isinstance(model, MoEForCausalLM)
    inputs = AutoTokenizer.from_pretrained(name, **arguments)(TEXT, return_tensors="pt")
    with torch.no_grad():
        return inputs["input_ids"], model(**inputs).logits


def test_everything_that_travels_is_there_and_nothing_else(run: Path, hub: HubServer, tmp_path: Path) -> None:
    model = shutil.copytree(run / "model", tmp_path / "model")
    for name in ("optimizer.pt", "trainer_state.json", ".secret", "notes.txt", "my_token"):
        (model / name).write_text("not for others")
    (model / "LICENSE").write_text("Do what you like.")
    publish("--model", model, "--repo", "user/mine")
    files = hub.files("user/mine")
    code = {
        "balancer.py",
        "balancing_settings.py",
        "configuration_moe.py",
        "experts.py",
        "modeling_moe.py",
        "router.py",
    }
    assert code < set(files)
    assert {name for name in files if not name.endswith(".py")} == {
        ".gitattributes",
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        *shards(model),
    }
    for name in shards(model):
        assert files[name] == (model / name).read_bytes()
    assert "auto_map" in json.loads(files["config.json"])
    assert b"Its terms: LICENSE." in files["README.md"]


def test_a_run_saved_by_an_older_version_gets_the_code_of_this_one(run: Path, tmp_path: Path, hub: HubServer) -> None:
    model = shutil.copytree(run / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    del config["auto_map"]
    (model / "config.json").write_text(json.dumps(config))
    for file in model.glob("*.py"):
        file.write_text("raise RuntimeError('out of date')")
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    publish("--model", model, "--repo", "user/mine")
    files = hub.files("user/mine")
    assert json.loads(files["config.json"])["auto_map"]["AutoModelForCausalLM"] == "modeling_moe.MoEForCausalLM"
    assert not any(b"out of date" in content for name, content in files.items() if name.endswith(".py"))
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before  # the run itself is left as it was


# --- again, and after an interruption ---


def test_pushed_again_unchanged_nothing_is_uploaded(run: Path, hub: HubServer) -> None:
    publish("--run", run, "--repo", "user/mine")
    uploaded, branches = list(hub.puts), dict(hub.repos["user/mine"].branches)
    publish("--run", run, "--repo", "user/mine")
    assert hub.puts == uploaded
    assert hub.repos["user/mine"].branches == branches  # not even an empty commit
    assert len(hub.asked("POST", "/commit/")) == 1


def test_only_what_changed_is_uploaded_and_old_weights_go(assembled: Path, hub: HubServer) -> None:
    """Guards against a repository with two models in it, of which Transformers loads the wrong one."""
    push(assembled, "user/mine", token=TOKEN)
    uploaded = len(hub.puts)
    one = b"".join(file.read_bytes() for file in sorted(assembled.glob("*.safetensors")))
    for file in assembled.glob("*.safetensors*"):
        file.unlink()
    (assembled / "model.safetensors").write_bytes(one)
    huggingface_hub.upload_file(path_or_fileobj=b"kept", path_in_repo="more/notes.txt", repo_id="user/mine")
    push(assembled, "user/mine", token=TOKEN)
    assert hub.puts[uploaded:] == [sha256(assembled / "model.safetensors")]
    files = hub.files("user/mine")
    assert [name for name in files if "safetensors" in name] == ["model.safetensors"]
    assert files["more/notes.txt"] == b"kept"


def cut_second_upload(hub: HubServer, cut: threading.Event) -> None:
    """The first file that is uploaded arrives; in the middle of the second, and of others, the connection breaks."""
    first: list[str] = []
    lock = threading.Lock()

    def upload(oid: str, received: int) -> bool:
        with lock:
            if not first:
                first.append(oid)
        if oid == first[0]:
            return True
        assert received > 0
        wait_until(30, lambda: first[0] in hub.lfs)
        hub.down = True
        cut.set()
        return False

    hub.before_upload = upload


def test_a_killed_push_goes_on_with_what_is_missing(run: Path, hub: HubServer, tmp_path: Path) -> None:
    cut = threading.Event()
    cut_second_upload(hub, cut)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--run", str(run), "--repo", "user/mine"],
        env=os.environ | hub.environment(tmp_path, TOKEN),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert cut.wait(120)
    process.kill()
    process.wait()
    arrived = set(hub.lfs)
    assert len(arrived) == 1
    assert set(hub.files("user/mine")) == {".gitattributes"}  # half a model is never seen

    hub.down, hub.before_upload = False, lambda oid, received: True
    began = len(hub.puts)
    publish("--run", run, "--repo", "user/mine")
    pictures = {sha256(file) for file in (run / "analysis").glob("*.png")}
    wanted = set(shards(run / "model").values()) | pictures
    assert sorted(hub.puts[began:]) == sorted(wanted - arrived)
    files = hub.files("user/mine")
    assert {name: hashlib.sha256(files[name]).hexdigest() for name in shards(run / "model")} == shards(run / "model")


def test_when_the_hub_is_gone_that_is_said_and_the_rest_sent_later(
    assembled: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
    cut_second_upload(hub, threading.Event())
    with pytest.raises(PublishingError, match=r"user/mine could not be pushed: .*the same command goes on"):
        push(assembled, "user/mine", token=TOKEN)
    arrived, began = set(hub.lfs), len(hub.puts)
    hub.down, hub.before_upload = False, lambda oid, received: True
    push(assembled, "user/mine", token=TOKEN)
    assert not arrived & set(hub.puts[began:])
    assert set(shards(assembled)) < set(hub.files("user/mine"))


def test_a_connection_that_breaks_once_is_no_matter(
    assembled: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    broken: list[str] = []
    hub.before_upload = lambda oid, received: oid in broken or bool(broken) or broken.append(oid) is not None
    push(assembled, "user/mine", token=TOKEN)
    assert sorted(hub.puts) == sorted([*hub.lfs, *broken])
    assert len(broken) == 1


# --- where it goes ---


def test_private_is_private(run: Path, hub: HubServer) -> None:
    publish("--run", run, "--repo", "user/mine", "--private")
    assert hub.repos["user/mine"].private
    assert huggingface_hub.hf_hub_download("user/mine", "config.json", token=TOKEN)
    for stranger in (False, STRANGER):
        with pytest.raises(RepositoryNotFoundError):
            huggingface_hub.hf_hub_download("user/mine", "README.md", token=stranger)
    publish("--run", run, "--repo", "user/mine")  # stays so
    assert hub.repos["user/mine"].private


def test_what_shall_be_private_does_not_go_to_a_public_repository(run: Path, hub: HubServer) -> None:
    huggingface_hub.create_repo("user/open")
    reason = refused("--run", run, "--repo", "user/open", "--private")
    assert reason == "error: --private must go with a private repository; got user/open, which is public"
    assert set(hub.files("user/open")) == {".gitattributes"}
    assert hub.puts == []


def test_a_revision_is_a_branch_and_made_where_it_is_missing(run: Path, hub: HubServer, tmp_path: Path) -> None:
    publish("--run", run, "--repo", "user/mine", "--revision", "steps/12")
    assert set(hub.files("user/mine", "main")) == {".gitattributes"}
    assert set(shards(run / "model")) < set(hub.files("user/mine", "steps/12"))
    assert b'revision="steps/12"' in hub.files("user/mine", "steps/12")["README.md"]
    commits = len(hub.repos["user/mine"].commits)
    publish("--run", run, "--repo", "user/mine", "--revision", "steps/12")
    assert len(hub.repos["user/mine"].commits) == commits
    loaded = AutoModelForCausalLM.from_pretrained("user/mine", revision="steps/12", cache_dir=tmp_path / "hub")
    assert_same_weights(loaded, AutoModelForCausalLM.from_pretrained(run / "model"))


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_verbs_of_transformers_work_too(run: Path, hub: HubServer, tmp_path: Path) -> None:
    model, tokenizer = (auto.from_pretrained(run / "model") for auto in (AutoModelForCausalLM, AutoTokenizer))
    commit = model.push_to_hub("user/verbs", private=True).oid
    tokenizer.push_to_hub("user/verbs")
    model.push_to_hub("user/verbs", revision="other")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.push_to_hub("user/verbs")
    assert {"modeling_moe.py", "tokenizer.json", "config.json"} < set(hub.files("user/verbs"))
    again = AutoTokenizer.from_pretrained("user/verbs", cache_dir=tmp_path / "hub")
    assert again(TEXT) == tokenizer(TEXT)
    original = AutoModelForCausalLM.from_pretrained(run / "model")
    for revision in (commit, "other"):
        loaded = AutoModelForCausalLM.from_pretrained("user/verbs", revision=revision, cache_dir=tmp_path / "hub")
        assert_same_weights(loaded, original)
    loaded = AutoModelForCausalLM.from_pretrained("user/verbs", cache_dir=tmp_path / "hub")
    assert_same_weights(loaded, model)


def test_a_folder_instead_of_a_repository(run: Path, tmp_path: Path) -> None:
    said = publish("--run", run, "--output", tmp_path / "out" / "mine")
    folder = tmp_path / "out" / "mine"
    assert "written to" in said
    assert list(folder.parent.iterdir()) == [folder]  # nothing else is left
    for name in shards(run / "model"):
        assert (folder / name).samefile(run / "model" / name)  # no second copy of the weights on the disk
    assert not (folder / "config.json").samefile(run / "model" / "config.json")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_weights(loaded, AutoModelForCausalLM.from_pretrained(run / "model"))
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert "--output must be new or empty" in refused("--run", run, "--output", folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_to_push_weights_are_not_copied(run: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a temporary folder as large as the model, on a disk that may not hold it."""
    linked = {}

    def contents(folder: Path) -> dict[str, int]:
        linked.update({file.name: file.is_symlink() for file in folder.iterdir()})
        return publishing.contents(folder)

    monkeypatch.setattr("equipoise.hub.contents", contents)
    publish("--run", run, "--repo", "user/mine")
    assert {name for name, link in linked.items() if link} == set(shards(run / "model"))


def test_on_another_disk_weights_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "model.safetensors").write_bytes(content)

    def other_disk(*paths: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(publishing.os, "link", other_disk)
    link_or_copy(tmp_path / "model.safetensors", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert not (tmp_path / "copy").samefile(tmp_path / "model.safetensors")


# --- nothing is sent ---


def test_a_dry_run_says_all_and_sends_nothing(
    run: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")  # it needs none
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    arguments = ["--run", run, "--repo", "user/mine", "--private", "--revision", "v2", "--license", "mit"]
    said = publish(*arguments, "--dry_run")
    assert hub.requests == []
    assert hub.repos == {}
    assert list((tmp_path / "temporary").iterdir()) == []
    assert "user/mine" in said
    assert "v2" in said
    assert "private" in said

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    publish(*arguments)
    sent = {name: content for name, content in hub.files("user/mine", "v2").items() if name != ".gitattributes"}
    listed = dict(
        reversed(line.split()) for line in said.splitlines() if line.split()[1:2] and line.split()[1] in sent
    )
    assert {name: int(size.replace(",", "")) for name, size in listed.items()} == {
        name: len(content) for name, content in sent.items()
    }

    said = publish("--run", run, "--output", tmp_path / "out", "--dry_run")
    assert "nothing is written" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--repo", "user/mine"], "either --run or --model must be given; got neither"),
        (["--run", "{run}", "--model", "{run}/model", "--repo", "user/mine"], "either --run or --model .* got both"),
        (["--run", "{run}"], "either --repo or --output must be given; got neither"),
        (["--run", "{run}", "--repo", "user/mine", "--output", "x"], "either --repo or --output .* got both"),
        (["--run", "{run}", "--repo", "mine"], "--repo must be user/name; got mine"),
        (["--run", "{run}", "--repo", "user/mi ne"], "--repo must be user/name, as the Hub allows it; got user/mi ne"),
        (["--run", "{run}", "--repo", "a/b/c"], "--repo must be user/name; got a/b/c"),
        (["--run", "{run}", "--output", "x", "--private"], "--private must go with --repo"),
        (["--run", "nowhere", "--repo", "user/mine"], "--run must be a run directory, .* got nowhere"),
        (["--run", "{stopped}", "--repo", "user/mine"], "--run must be finished, .* which is stopped at step 7"),
        (["--model", "{run}", "--repo", "user/mine"], "the model must be a folder with a config.json"),
        (["--model", "{cut}", "--repo", "user/mine"], ".*/model-00002-of-.* must be a whole safetensors file"),
        (["--model", "{stock}", "--repo", "user/mine"], "model_type must be equipoise_moe, .* got qwen3_moe"),
    ],
)
def test_what_cannot_be_published_is_said_before_anything_is_sent(
    run: Path, hub: HubServer, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    stopped, stock = tmp_path / "stopped", tmp_path / "stock"
    shutil.copytree(run, stopped, ignore=shutil.ignore_patterns("model"))
    (stopped / "status.json").write_text('{"state": "stopped", "step": 7}')
    cut = shutil.copytree(run / "model", tmp_path / "cut")
    next(cut.glob("model-00002-of-*")).unlink()
    stock.mkdir()
    (stock / "config.json").write_text('{"model_type": "qwen3_moe"}')
    places = {"run": run, "stopped": stopped, "cut": cut, "stock": stock}
    with pytest.raises(SystemExit, match=f"^error: {reason}"):
        publish(*(argument.format(**places) for argument in arguments))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("file", "field", "value", "reason"),
    [
        (
            "model/config.json",
            ["architectures"],
            ["MyMoE"],
            r"architectures must be one of MoEForCausalLM, .*; got \['MyMoE'\]",
        ),
        ("model/config.json", ["architectures"], 3, ".*architectures.*"),
        ("model/config.json", ["hidden_size"], "16", "must be of equipoise_moe; got .*'hidden_size'.*"),
        ("model/config.json", ["id2label"], 3, "must be of equipoise_moe; got .*"),
        ("model/config.json", [], [1], r"must hold a mapping; got \[1\]"),
        ("evaluation.json", [], [1], r"must hold a mapping; got \[1\]"),
        ("evaluation.json", ["domains"], None, "domains must be a mapping; got None"),
        (
            "evaluation.json",
            ["domains", "code"],
            {"perplexity": 2.0},
            "domains code must hold bits_per_byte; got none",
        ),
        ("analysis/analysis.json", ["mean_over_layers"], {}, "mean_over_layers must hold mutual_.*_bits; got none"),
        ("analysis/analysis.json", ["layers"], [{}, {}], r"layers\[0\] must hold layer; got none"),
        ("analysis/analysis.json", ["layers"], {}, r"layers must be a list; got {}"),
        ("training.json", ["steps"], "12", "steps must be a whole number; got 12"),
        ("training.json", [], {}, "must hold world_size; got none"),
        ("data.json", ["code"], {}, "code must hold source; got none"),
        ("settings.yaml", [], {}, "must hold block_size; got none"),
    ],
)
def test_a_file_of_the_run_that_is_wrong_is_named_in_one_line(
    run: Path, hub: HubServer, tmp_path: Path, file: str, field: list[str], value: Any, reason: str
) -> None:
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    record = json.loads((copy / file).read_text()) if field else value
    at = record
    for name in field[:-1]:
        at = at[name]
    if field:
        at[field[-1]] = value
    (copy / file).write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=f"^error: {copy / file} {reason}$") as stopped:
        publish("--run", copy, "--repo", "user/mine")
    assert "\n" not in str(stopped.value.code)
    assert hub.requests == []


def test_without_a_token_that_is_said_first(run: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "a token must be there to push with" in refused("--run", run, "--repo", "user/mine")
    assert hub.requests == []


def test_metadata_that_the_hub_refuses_stops_the_push_before_the_weights(run: Path, hub: HubServer) -> None:
    assert '"license" must be one of' in refused("--run", run, "--repo", "user/mine", "--license", "my own")
    assert hub.puts == []


@pytest.mark.parametrize(
    ("token", "repo", "reason"),
    [
        ("hf_nobodys", "user/mine", "the token must be one that the Hub accepts; got 401 for user/mine"),
        (TOKEN, "other/mine", "the token must allow to write to other/mine; got 403"),
        (READER, "user/new", "the token must allow to write to user/new; got 403"),
        (READER, "user/there", "the token must allow to write to user/there; got 403"),
        (STRANGER, "user/there", "the token must allow to write to user/there; got 403"),
    ],
)
def test_who_may_not_write_is_told_so(
    assembled: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str, repo: str, reason: str
) -> None:
    huggingface_hub.create_repo("user/there")
    hub.echo = True
    with pytest.raises(PublishingError) as refusal:
        push(assembled, repo, token=token)
    assert str(refusal.value).startswith(reason)
    # However it is shown, with all that led to it.
    assert token not in "".join(traceback.format_exception(refusal.value))
    assert hub.puts == []
    assert "README.md" not in hub.files("user/there")


def test_what_the_hub_says_is_told_without_the_token_that_it_repeats(assembled: Path, hub: HubServer) -> None:
    hub.echo = True
    with pytest.raises(PublishingError, match=r"Invalid reference for a branch: refs/x.*<token>") as refusal:
        push(assembled, "user/mine", token=TOKEN, revision="refs/x")
    assert TOKEN not in "".join(traceback.format_exception(refusal.value))


WATCHED = """
import logging, os, runpy, sys
logging.basicConfig(level=0)
import huggingface_hub.constants
for token, repo, xet in {cases!r}:
    os.environ["HF_TOKEN"] = token
    huggingface_hub.constants.HF_HUB_DISABLE_XET = not xet
    sys.argv = ["publish.py", "--run", {run!r}, "--repo", repo]
    try:
        runpy.run_path({script!r}, run_name="__main__")
    except SystemExit as stopped:
        print(stopped.code)
"""


def test_the_token_is_in_no_output(run: Path, hub_server: HubServer, tmp_path: Path) -> None:
    """With every logger at its most talkative, and the Hub's client in its debugging mode: pushed, and refused."""
    cases = [
        (TOKEN, "user/mine", False),
        ("hf_nobodys", "user/mine", False),
        (STRANGER, "user/mine", False),
        (READER, "user/other", False),
        (TOKEN, "user/chunked", True),  # xet, which this server does not have
    ]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED.format(cases=cases, run=str(run), script=str(SCRIPT))],
        env=os.environ | hub_server.environment(tmp_path) | {"HF_DEBUG": "1", "RUST_LOG": "debug"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    output = done.stdout + done.stderr
    assert "pushed" in output
    assert "got 401" in output
    assert output.count("got 403") == 2
    assert "error: user/chunked could not be pushed: " in output
    assert "curl" in output  # the client did show its requests
    assert hub_server.asked("POST", "/commit/")[0].token == TOKEN  # and did send the token
    for token, *_ in cases:
        assert token not in output


# --- the server itself ---


def test_the_server_refuses_as_the_hub_does(hub: HubServer) -> None:
    huggingface_hub.create_repo("user/closed", private=True)
    huggingface_hub.create_repo("user/open")
    with pytest.raises(HfHubHTTPError, match="401"):
        huggingface_hub.HfApi(token="hf_nobodys").model_info("user/open")
    assert huggingface_hub.HfApi(token=False).model_info("user/open").private is False
    for token in (False, STRANGER):
        with pytest.raises(RepositoryNotFoundError):
            huggingface_hub.HfApi(token=token).model_info("user/closed")
    with pytest.raises(HfHubHTTPError, match="403"):
        huggingface_hub.HfApi(token=STRANGER).upload_file(
            path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="user/open"
        )
    assert huggingface_hub.whoami()["name"] == "user"


def test_the_server_serves_a_file_in_parts(hub: HubServer, tmp_path: Path) -> None:
    huggingface_hub.create_repo("user/open")
    content = os.urandom(100_000)
    huggingface_hub.upload_file(path_or_fileobj=content, path_in_repo="a/b.safetensors", repo_id="user/open")
    url = huggingface_hub.hf_hub_url("user/open", "a/b.safetensors")
    metadata = huggingface_hub.get_hf_file_metadata(url)
    assert (metadata.size, metadata.etag) == (len(content), hashlib.sha256(content).hexdigest())
    part: Any = huggingface_hub.utils.get_session().get(url, headers={"Range": "bytes=1000-1999"})
    assert (part.status_code, part.content) == (206, content[1000:2000])
    file = huggingface_hub.hf_hub_download("user/open", "a/b.safetensors", cache_dir=tmp_path)
    assert Path(file).read_bytes() == content
