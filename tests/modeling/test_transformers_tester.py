"""The yardstick of Transformers' own models, held against ours: the tests in its source distribution."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

YARD = Path(__file__).parent / "yard"
# Why a test may be skipped: something that is not here, or that no decoder-only text model has.
REASONS = (
    r"test requires (an )?(accelerator|multiple accelerators|deepspeed|MPS|the kernels library|Flash Attention( \d)?)",
    r"Test requires torchao",
    r"Need at least \d FSDP workers",
    r"test is slow",
    r"(Model|This model) is not (a )?composite( model)?",
    r"MoEModel does not support SDPA",  # says the test of composite models, of each that is none
    r"No subconfigs",
    r"No sequence-to-sequence language modeling head",
    r"Model does not have position embeddings",
    r"Model does not support (output_attentions|sliding window mask)",  # as weights inside the SDPA kernel
    r"has no axial RoPE",
    r"No conversion found",
    r"Not a prioritized model",
)


@pytest.fixture(scope="module")
def transformers_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where `tests` is that of the installed version of Transformers, with ours among them."""
    folder = tmp_path_factory.mktemp("transformers")
    version = f"transformers=={transformers.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", version]
    downloaded = subprocess.run(pip, cwd=folder, capture_output=True, text=True)
    if downloaded.returncode:
        pytest.skip(f"no package index gave the source distribution of {version}: {downloaded.stderr[-300:]}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        members.extractall(folder, filter="data")
    tests = (folder / archive.name.removesuffix(".tar.gz") / "tests").rename(folder / "tests")
    for package in ("", "exporters", "generation", "utils"):
        (tests / package).mkdir(exist_ok=True)
        (tests / package / "__init__.py").touch()
    (tests / "exporters/test_export.py").write_text("class ExportTesterMixin:\n    pass\n")
    (tests / "generation/test_utils.py").write_text("class GenerationTesterMixin:\n    pass\n")
    (tests / "utils/test_configuration_utils.py").write_text("config_common_kwargs = {}\n")
    for name in ("distributed_testing_utils.py", "own_tester.py"):
        shutil.copy(YARD / name, tests)
    (folder / "pytest.ini").write_text("[pytest]\n")
    return folder


@pytest.mark.processes
@pytest.mark.parametrize(("group", "least"), [("TestModel", 90), ("TestParallel", 8)])
def test_our_models_pass_the_tests_of_transformers(transformers_tests: Path, group: str, least: int) -> None:
    flags = ["-q", "-rfEs", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, f"tests/own_tester.py::{group}"],
        cwd=transformers_tests,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-10_000:]
    skipped = re.findall(r"^SKIPPED \[\d+\] [^:]+:\d+: (.*)$", run.stdout, flags=re.M)
    unexplained = [reason for reason in skipped if not any(re.search(known, reason) for known in REASONS)]
    assert not unexplained
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= least, run.stdout[-2000:]
