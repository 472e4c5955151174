"""A measurement of models whose routing is known."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planted import DOMAINS, EXPERTS, by_domain, planted_documents, planted_tokenizer

from equipoise.analysis import Measurement, MeasurementSettings, Measurer, RunInput, analyse, mutual_information
from equipoise.data import evaluation_windows, read_held_out


def test_an_expert_for_each_domain_scores_one_and_uniform_experts_score_at_the_null(
    measurements: list[Measurement],
) -> None:
    specialised, uniform = measurements
    # The one token that opens every document is the same in all domains: without it the score is 1 exactly.
    tokens = Counter()
    for window in evaluation_windows(planted_documents(), planted_tokenizer(), 64):
        tokens[window["domain"]] += len(window["input_ids"])
    opening = 10 / tokens["ash"]  # ten documents of each
    shares = torch.eye(EXPERTS, dtype=torch.float64) * (1 - opening)
    shares[:, 0] += opening
    expected = float(mutual_information(shares[:, None]))
    assert float(specialised.specialisation.bits[0]) == pytest.approx(expected, abs=1e-12)
    assert float(specialised.specialisation.normalised[0]) > 0.97
    assert float(specialised.specialisation.p_value[0]) == 1 / 201
    assert [layer.tolist() for layer in specialised.balance.dead_experts] == [0, 1]
    for found, layer in ((specialised.specialisation, 1), (uniform.specialisation, 0), (uniform.specialisation, 1)):
        assert float(found.bits[layer]) < float(found.null_quantile_95[layer])
        assert float(found.p_value[layer]) > 0.05
        assert float(found.normalised[layer]) < 0.01
    # Letters say all there is to know of these routers.
    torch.testing.assert_close(
        mutual_information(specialised.token_identity), specialised.specialisation.bits, atol=1e-3, rtol=0
    )
    assert specialised.vocabulary_specialisation.tolist() == pytest.approx([1, 1])
    # One expert a token has no partner, and full weight.
    assert specialised.coactivation.conditional().sum() == 0
    assert specialised.confidence.mean()[1].tolist() == pytest.approx([1, 1])


def test_favourites_and_texts_are_those_of_the_router(measurements: list[Measurement]) -> None:
    specialised = measurements[0]
    for expert, favourites in enumerate(specialised.favourites[0]):
        letters = [token for token, _ in favourites if len(token) == 1]
        assert len(letters) == 6
        assert {by_domain(letter) for letter in letters} == {expert}
        assert all(share == 1 for _, share in favourites)
    for text in specialised.texts:
        assert len(text.pieces) == 60
        for piece, experts in zip(text.pieces, text.experts.tolist(), strict=True):
            assert experts[0] == [by_domain(piece) if len(piece) == 1 else 0]
        assert bool((text.weights == 255).all())


def test_saturation_is_against_earlier_checkpoints(measurements: list[Measurement]) -> None:
    specialised, uniform = measurements
    assert uniform.saturation is None
    assert specialised.saturation is not None
    assert specialised.saturation.steps == (10,)
    assert specialised.saturation.share[0, 1] == 1  # the second layer was as it is
    assert specialised.saturation.share[0, 0] < 0.5


def test_the_untrained_model_is_the_same_for_runs_of_one_architecture(
    measurements: list[Measurement], planted_runs: dict[str, Path]
) -> None:
    specialised, uniform = measurements
    assert specialised.untrained is uniform.untrained
    assert specialised.untrained is not None
    assert not torch.equal(specialised.untrained.load, specialised.trace.load)
    # Nothing of the world's randomness is used up, and the same seed gives the same model.
    torch.manual_seed(7)
    before = torch.rand(1)
    torch.manual_seed(7)
    run = RunInput(
        "again", planted_runs["uniform"] / "model", read_held_out(planted_runs["uniform"] / "validation.parquet"), 64
    )
    again = Measurer(MeasurementSettings(permutations=1), layers=[0], num_tokens=4).measure(run)
    assert torch.equal(torch.rand(1), before)
    assert again.untrained is not None
    assert torch.equal(again.untrained.load, specialised.untrained.load)
    other = Measurer(MeasurementSettings(permutations=1, seed=1), layers=[0], num_tokens=4).measure(run)
    assert other.untrained is not None
    assert not torch.equal(other.untrained.load, specialised.untrained.load)


def test_all_numbers_are_named_and_are_json(measurements: list[Measurement]) -> None:
    numbers = analyse(measurements[0])
    layer = numbers["layers"][0]
    assert layer["mutual_information_bits"] == layer["token_identity_bits"] == pytest.approx(1.95, abs=0.05)
    assert layer["null_mean_bits"] < layer["null_quantile_95_bits"] < 0.5
    assert 0 < layer["untrained_bits"] < 2
    assert layer["domain_specialisation"] == pytest.approx(0.99, abs=0.01)
    assert [row[place] for place, row in enumerate(layer["divergence_bits"])] == [0] * 4
    assert layer["divergence_bits"][1][2] == pytest.approx(1, abs=0.03)
    assert list(layer["load_by_domain"]) == list(DOMAINS)
    assert numbers["router_saturation"]["steps"] == [10]
    assert numbers["tokens_covered"] == 1

    def leaves(value: object) -> list:
        if isinstance(value, dict | list):
            return [leaf for part in (value.values() if isinstance(value, dict) else value) for leaf in leaves(part)]
        return [value]

    assert all(leaf is None or isinstance(leaf, str | int) or math.isfinite(leaf) for leaf in leaves(numbers))
    without = analyse(replace(measurements[0], untrained=None, saturation=None))
    assert without["layers"][0]["untrained_bits"] is None
    assert without["router_saturation"] is None
