"""The whole script under DeepSpeed ZeRO, launched as users launch it. (On CPUs DeepSpeed runs over gloo.)"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import ROOT, launch, lines, settings, weights, written


@pytest.mark.processes
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_under_zero_is_the_run_without(stage: int, corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not among the test requirements: it compiles for minutes")
    values = settings(corpus, tmp_path / "zero", global_batch_size=8, checkpoint_steps=6)
    file = written(tmp_path, values)
    output, _ = (plain := launch(2, [file, "--output_dir", str(tmp_path / "plain")])).communicate(timeout=300)
    assert plain.returncode == 0, output[-3000:]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port=0"]
    command += [f"--config_file={ROOT}/launch_configs/zero{stage}.yaml", "--mixed_precision=no"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("ACCELERATE_USE_CPU", None)  # it would give DDP, without a word
    if not torch.accelerator.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    command += [str(ROOT / "scripts" / "train.py"), file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, weight in weights(tmp_path / "plain" / "model").items():
        torch.testing.assert_close(weights(tmp_path / "zero" / "model")[name], weight, atol=1e-4, rtol=0, msg=name)
    for first, second in zip(lines(tmp_path / "zero/load.jsonl"), lines(tmp_path / "plain/load.jsonl"), strict=True):
        if first["step"] == 1:
            assert first == second
    # Its optimizer could only be read by unpickling: a checkpoint is a model, and the run is not gone on with.
    assert not (tmp_path / "zero" / "checkpoints" / "step-00000006" / "optimizer").exists()
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "error: resume must be off under DeepSpeed" in done.stderr
