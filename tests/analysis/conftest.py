"""Runs whose routing is known, measured once."""

from pathlib import Path

import pytest
from planted import by_domain, evenly, planted_model, planted_tokenizer, save_planted_run, write_records

from equipoise.analysis import Measurement, MeasurementSettings, Measurer, RunInput, RunRecord
from equipoise.data import read_held_out


@pytest.fixture(scope="session")
def planted_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two run directories: `specialised`, whose first layer has an expert for each domain and whose second does not
    care, with a checkpoint that did not care either; and `uniform`, whose layers do not care."""
    folder = tmp_path_factory.mktemp("planted")
    runs = {
        "specialised": save_planted_run(folder / "specialised", [by_domain, evenly]),
        "uniform": save_planted_run(folder / "uniform", [evenly, evenly]),
    }
    for seed, run in enumerate(runs.values()):
        write_records(run, seed=seed)
    checkpoint = runs["specialised"] / "checkpoints" / "step-00000010" / "model"
    planted_model(planted_tokenizer(), [evenly, evenly]).save_pretrained(checkpoint)
    return runs


@pytest.fixture(scope="session")
def measurements(planted_runs: dict[str, Path]) -> list[Measurement]:
    """Both, measured."""
    measurer = Measurer(MeasurementSettings(permutations=200), layers=range(2), num_tokens=60)
    return [
        measurer.measure(
            RunInput(
                name=name,
                model=run / "model",
                documents=read_held_out(run / "validation.parquet"),
                block_size=64,
                record=RunRecord.read(run),
            )
        )
        for name, run in planted_runs.items()
    ]
