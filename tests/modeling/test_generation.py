"""Every way to generate gives what the stock model with the same weights gives."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, set_seed
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeForCausalLM

from equipoise import MoEConfig, MoEForCausalLM
from tests.modeling.stock_twins import biased, glm4_moe

Make = Callable[..., MoEConfig]
NEW = 12
GREEDY = {"do_sample": False}
MODES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 4, "do_sample": False, "length_penalty": 1.2, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "repetition penalty": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "beams in a static cache": {"num_beams": 3, "do_sample": False, "cache_implementation": "static"},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 3},
}


OFFLOADED = {
    "offloaded cache": {"do_sample": False, "cache_implementation": "offloaded"},
    "offloaded static cache": {"do_sample": False, "cache_implementation": "offloaded_static"},
}
needs_streams = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="Transformers moves an offloaded cache on CUDA streams"
)


@pytest.fixture(scope="module")
def ours(tiny_config: Make) -> MoEForCausalLM:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    fields = {"scoring_func": "sigmoid", "routed_scaling_factor": 1.5, "eos_token_id": None, "rope_parameters": rope}
    return biased(MoEForCausalLM(tiny_config(**fields))).eval()


@pytest.fixture(scope="module")
def stock(ours: MoEForCausalLM) -> Glm4MoeForCausalLM:
    return glm4_moe(ours)


def prompts(rows: int = 2) -> dict[str, Tensor]:
    """Of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 64, (rows, 7), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generated(model: torch.nn.Module, inputs: dict[str, Tensor], **mode: Any) -> Any:
    set_seed(3)
    return model.generate(
        **inputs, max_new_tokens=NEW, min_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, **mode
    )


@pytest.mark.parametrize("mode", [*MODES, *(pytest.param(mode, marks=needs_streams) for mode in OFFLOADED)])
def test_every_mode_generates_as_the_stock_model(ours: MoEForCausalLM, stock: Glm4MoeForCausalLM, mode: str) -> None:
    device = "cuda" if mode in OFFLOADED else "cpu"
    inputs = prompts(1 if mode == "prompt lookup" else 2)  # which takes one prompt at a time
    inputs = {name: value.to(device) for name, value in inputs.items()}
    got, expected = (
        generated(copy.deepcopy(model).to(device), inputs, **(MODES | OFFLOADED)[mode]) for model in (ours, stock)
    )
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


def test_left_padded_prompts_generate_as_each_alone(ours: MoEForCausalLM) -> None:
    inputs = prompts(3)
    together = generated(ours, inputs, **GREEDY).sequences[:, -NEW:]
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = inputs["input_ids"][row][mask][None]
        assert torch.equal(
            generated(ours, {"input_ids": alone, "attention_mask": torch.ones_like(alone)}, **GREEDY).sequences[
                0, -NEW:
            ],
            together[row],
        )


def test_an_assistant_changes_nothing(ours: MoEForCausalLM, tiny_config: Make) -> None:
    """Assisted decoding rolls the cache back; what was counted or kept in the model would show."""
    torch.manual_seed(5)
    assistant = MoEForCausalLM(tiny_config(num_hidden_layers=2, eos_token_id=None)).eval()
    inputs = prompts(1)
    alone = generated(ours, inputs, **GREEDY).sequences
    assert torch.equal(generated(ours, inputs, **GREEDY, assistant_model=assistant).sequences, alone)
    assert torch.equal(generated(ours, inputs, **GREEDY, assistant_model=ours).sequences, alone)


def test_generation_from_embeddings(ours: MoEForCausalLM) -> None:
    inputs = prompts()
    embeddings = {
        "inputs_embeds": ours.get_input_embeddings()(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"],
    }
    from_ids = generated(ours, inputs, **GREEDY).sequences[:, -NEW:]
    assert torch.equal(generated(ours, embeddings, **GREEDY).sequences, from_ids)


def test_a_conversation_goes_on_from_its_cache(ours: MoEForCausalLM) -> None:
    inputs = prompts(1)
    first = generated(ours, inputs, **GREEDY)
    grown = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    longer = {"input_ids": grown, "attention_mask": torch.ones_like(grown)}
    with_cache = generated(ours, longer, **GREEDY, past_key_values=first.past_key_values)
    assert torch.equal(with_cache.sequences, generated(ours, longer, **GREEDY).sequences)


def test_stopping_and_the_saved_generation_config(tiny_config: Make, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(eos_token_id=None)).eval()
    inputs = prompts(1)
    sequence = generated(model, inputs, **GREEDY).sequences
    new = sequence[0, -NEW:].tolist()
    stop = new[NEW // 2]
    model.generation_config = GenerationConfig(
        eos_token_id=[stop], pad_token_id=0, max_new_tokens=NEW, do_sample=False
    )
    model.save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.generate(**inputs)[0, 7:].tolist() == new[: new.index(stop) + 1]


@pytest.mark.parametrize("mode", ["static cache", "greedy"])
def test_generation_leaves_the_balancer_alone(tiny_config: Make, mode: str) -> None:
    """In training mode too: on one rank alone it would wait for the others in an all-reduce."""
    model = MoEForCausalLM(tiny_config(balancing_mode="loss_free", scoring_func="sigmoid")).train()
    before = model.balancer.state_dict()
    generated(model, prompts(), **MODES[mode])
    assert model.balancer.state_dict() == before
