"""inspect, against counts taken without our code, and against models whose routing is known."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from launched import launched
from planted import DOMAINS, by_domain, evenly, planted_documents, planted_model, planted_tokenizer
from stock_balancing import EXPERTS, FAMILIES, Seen, qwen3_moe, routers_of
from torch import Tensor
from torch.utils.data import DataLoader
from trainers import examples
from transformers import LlamaConfig, LlamaForCausalLM

import equipoise
from equipoise import MoEConfig, MoEForCausalLM
from equipoise.analysis import Architecture, trace_routing
from equipoise.analysis.specialisation import measure_balance, measure_specialisation
from equipoise.integrations import find_routers

TABULATE = runpy.run_path(str(Path(__file__).parents[2] / "scripts/tabulate_stock_models.py"))
ROWS, BATCH = 11, 4
Row = dict[str, Any]


def rows(number: int = ROWS) -> list[Row]:
    """Uneven lengths; domains by turns, two sequences to a document."""
    made = examples(number, lengths=[12, 5, 9, 3], prompts=[0])
    return [row | {"domain": f"domain {place // 2 % 2}", "document": place // 2} for place, row in enumerate(made)]


def recount(model: Any, data: list[Row], batch_size: int) -> tuple[Tensor, Tensor]:
    """Load `[L, E]` of all tokens, and MaxVio `[L]` as a mean over batches."""
    seen, loads = Seen(model), []
    for start in range(0, len(data), batch_size):
        batch = data[start : start + batch_size]
        mask = torch.stack([row["attention_mask"] for row in batch])
        output = seen(input_ids=torch.stack([row["input_ids"] for row in batch]), attention_mask=mask)
        loads.append(
            torch.stack(
                [
                    experts[mask.flatten() != 0].flatten().bincount(minlength=EXPERTS)
                    for experts in output.selected_experts
                ]
            )
        )
    vio = torch.stack([load.max(-1).values / load.double().mean(-1) - 1 for load in loads]).mean(0)
    return torch.stack(loads).sum(0), vio


@pytest.mark.parametrize("family", FAMILIES)
def test_the_load_of_stock_models(family: str) -> None:
    model = FAMILIES[family]().train()
    model.lm_head.eval()
    load, micro = recount(FAMILIES[family]().eval(), rows(), BATCH)
    found = equipoise.inspect(model, DataLoader(rows(), BATCH))
    assert model.training
    assert not model.lm_head.training  # each module as it was
    assert not any(module._forward_hooks for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())
    assert [layer.load for layer in found.layers] == load.tolist()
    assert len(found.layers) == len(routers_of(model))
    assert found.tokens == sum(int(row["attention_mask"].sum()) for row in rows())
    assert found.sequences == ROWS
    for place, layer in enumerate(found.layers):
        expected = load[place].double()
        assert layer.max_vio == pytest.approx(float(expected.max() / expected.mean() - 1), rel=1e-6)
        assert layer.max_vio_micro == pytest.approx(float(micro[place]), rel=1e-6)
        assert layer.dead_experts == int((expected == 0).sum())
        assert 0 < layer.load_entropy < 1
        assert layer.specialisation is None
    assert found.domains == {}


@pytest.mark.parametrize(
    "name",
    # Routers that put out something else than most, or sit elsewhere; of those that older versions have.
    [
        "DbrxForCausalLM",
        "Gemma4ForCausalLM",
        "GptOssForCausalLM",
        "JetMoeForCausalLM",
        "Llama4ForCausalLM",
        "Qwen3VLMoeForConditionalGeneration",
    ],
)
def test_the_load_of_models_of_their_own_kind(name: str) -> None:
    model = TABULATE["tiny_model"](name).eval()
    watch = TABULATE["Watch"](model, find_routers(model))
    batch = next(iter(DataLoader(rows(), ROWS)))
    found = equipoise.inspect(model, [batch])
    for layer, inspected in enumerate(found.layers):
        assert inspected.load == watch.load(layer, batch["attention_mask"].bool()), layer
    shape = Architecture.of(model)
    assert shape.num_moe_layers == len(found.layers)
    assert shape.active_parameters is None or 0 < shape.active_parameters < shape.parameters


def test_without_a_mask_every_position_is_a_token() -> None:
    data = [{"input_ids": row["input_ids"]} for row in rows()]
    found = equipoise.inspect(qwen3_moe(), DataLoader(data, BATCH))
    assert found.tokens == ROWS * 12


@pytest.mark.parametrize("cut", [False, True])
def test_specialisation_of_a_model_that_is_known(cut: bool) -> None:
    tokenizer, documents = planted_tokenizer(), planted_documents()
    model = planted_model(tokenizer, [by_domain, evenly])
    size = 61 if cut else 121
    data = []
    for number, document in enumerate(documents):
        ids = [0, *tokenizer.encode(document["text"])]
        for start in range(0, len(ids) - 1, size - 1):
            row = {"domain": document["domain"], "document": number}
            data.append(row | {"input_ids": torch.tensor(ids[start : start + size])})
    found = equipoise.inspect(
        model, DataLoader(data, 5), domains="domain", documents="document" if cut else None, permutations=200
    )
    trace = trace_routing(model, tokenizer, documents, block_size=size)
    expected, even = measure_specialisation(trace, permutations=200), measure_balance(trace)
    assert found.domains == dict.fromkeys(DOMAINS, 20 if cut else 10)
    assert found.documents == 40
    for place, layer in enumerate(found.layers):
        assert layer.specialisation is not None
        assert layer.specialisation.mutual_information == pytest.approx(float(expected.bits[place]), abs=1e-9)
        assert layer.specialisation.null_mean == pytest.approx(float(expected.null_mean[place]), abs=1e-9)
        assert layer.specialisation.p_value == float(expected.p_value[place])
        assert layer.max_vio == pytest.approx(float(even.max_vio_global[place]))
    first, second = (layer.specialisation for layer in found.layers)
    assert first is not None
    assert second is not None
    assert first.normalised > 0.97
    assert first.p_value == 1 / 201
    assert second.p_value > 0.05


def test_what_it_prints_and_writes() -> None:
    found = equipoise.inspect(qwen3_moe(), DataLoader(rows(), BATCH), domains="domain", permutations=20)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    table = str(found).splitlines()
    assert table[0] == (
        f"Qwen3MoeForCausalLM: {found.tokens} tokens of 11 sequences; 2 of 8 experts per token; 2 domains"
    )
    assert table[2].split() == ["layer", "MaxVio", "micro", "entropy", "dead", "MI,", "bits", "chance", "p"]
    for layer, line in zip(found.layers, table[3:], strict=True):
        assert layer.specialisation is not None
        assert f"{layer.max_vio:.3f}" in line
        assert f"{layer.specialisation.mutual_information:.3f}" in line


def test_one_domain_has_nothing_to_specialise_in() -> None:
    data = [row | {"domain": 3} for row in rows()]
    found = equipoise.inspect(qwen3_moe(), DataLoader(data, BATCH), domains="domain")
    assert found.domains == {"3": ROWS}
    assert all(layer.specialisation is None for layer in found.layers)


def test_ours_and_wrapped_models(tiny_config: Callable[..., MoEConfig]) -> None:
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(balancing_mode="loss_free", scoring_func="sigmoid")).train()
    found = equipoise.inspect(model, DataLoader(rows(), BATCH))
    assert model.balancer.metrics() == {}  # evaluation counts nothing
    loads = torch.zeros(2, 8, dtype=torch.long)
    for row in rows():
        output = model.eval()(row["input_ids"][None], row["attention_mask"][None], output_router_logits=True)
        for layer, experts in enumerate(output.selected_experts):
            loads[layer] += experts[row["attention_mask"] != 0].flatten().bincount(minlength=8)
    assert [layer.load for layer in found.layers] == loads.tolist()
    peft = pytest.importorskip("peft")
    stock = qwen3_moe()
    bare = equipoise.inspect(stock, DataLoader(rows(), BATCH))
    balancer = equipoise.balance(stock, "global_batch")
    wrapped = peft.get_peft_model(stock, peft.LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["gate"]))
    assert equipoise.inspect(wrapped, DataLoader(rows(), BATCH)).layers == bare.layers
    assert balancer.attached


def inspect_on_a_rank(rank: int, world_size: int, prepared: bool) -> str:
    model = qwen3_moe()
    with launched(rank, world_size):
        accelerator = Accelerator(cpu=True)
        if prepared:
            model, loader = accelerator.prepare(model, DataLoader(rows(), BATCH))
        else:  # one process has less than the other
            loader = DataLoader(rows()[:8] if rank == 0 else rows()[8:], BATCH)
            model = accelerator.prepare(model)
        return json.dumps(equipoise.inspect(model, loader, domains="domain", permutations=50).to_dict())


@pytest.mark.processes
@pytest.mark.parametrize("prepared", [True, False])
def test_two_processes_find_what_one_does(run_processes: Callable[..., list[Any]], prepared: bool) -> None:
    # 11 sequences in batches of 4: to have as many as the first process, Accelerate gives the second some again.
    alone = equipoise.inspect(qwen3_moe(), DataLoader(rows(), BATCH), domains="domain", permutations=50)
    one, other = map(json.loads, run_processes(2, inspect_on_a_rank, prepared))
    assert one == other
    for found, layer in zip(one["layers"], alone.to_dict()["layers"], strict=True):
        specialisation, expected = found.pop("specialisation"), layer.pop("specialisation")
        assert found["load"] == layer["load"]
        assert found["max_vio"] == layer["max_vio"]
        assert found["max_vio_micro"] == pytest.approx(layer["max_vio_micro"])
        assert specialisation["mutual_information"] == pytest.approx(expected["mutual_information"])
    assert one["tokens"] == alone.tokens
    assert one["sequences"] == ROWS


def test_says_what_is_missing() -> None:
    model = qwen3_moe().train()
    for message, data, given in [
        ("the batches must hold a column topic; got input_ids, .*", rows(), {"domains": "topic"}),
        ("dataloader must hold at least one batch; got none", [], {}),
        ("permutations must be at least 1; got 0", rows(), {"domains": "domain", "permutations": 0}),
        (
            "each document must be of one domain; got domain 0 and domain 1 for 0",
            [row | {"document": 0} for row in rows()],
            {"domains": "domain", "documents": "document"},
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            equipoise.inspect(model, DataLoader(data, BATCH), **given)
        assert model.training
        assert not any(module._forward_hooks for module in model.modules())
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match=r"model must have routers: .* got LlamaForCausalLM"):
        equipoise.inspect(dense, DataLoader(rows(), BATCH))
