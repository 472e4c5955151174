"""Likelihoods and generated texts against one sequence at a time, in float64; and on several processes."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from launched import launched
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from equipoise import MoEForCausalLM
from equipoise.evaluation import evaluate_domains
from equipoise.evaluation.generation import Stopping, generate_texts
from equipoise.evaluation.items import Item
from equipoise.evaluation.likelihoods import _caches_keys_and_values, choice_log_likelihoods
from equipoise.evaluation.processes import share, this_process
from equipoise.evaluation.requests import ChoiceRequest, Prompt, choice_requests, prompts

V = 50  # entries of the stock models' vocabularies


def item(context: str, *choices: str, delimiter: str = " ") -> Item:
    return Item(domain="d", cluster="0", context=context, delimiter=delimiter, choices=choices, row={})


def random_requests(vocab_size: int, seed: int = 0, number: int = 11) -> list[ChoiceRequest]:
    """Contexts of 1 to 20 tokens, 2 to 5 choices of 1 to 6 tokens, some items with choices of one token only."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(most: int) -> list[int]:
        size = int(torch.randint(1, most + 1, (), generator=generator))
        return torch.randint(2, vocab_size, (size,), generator=generator).tolist()

    return [
        ChoiceRequest(tokens(20), [tokens(1 if index % 3 == 0 else 6) for _ in range(2 + index % 4)], 0)
        for index in range(number)
    ]


@torch.no_grad()
def one_at_a_time(model: PreTrainedModel, request: ChoiceRequest) -> list[float]:
    """The sum of the log-probabilities of each choice's tokens, from a forward pass without cache or padding."""
    found = []
    for continuation in request.continuations:
        ids = request.context + continuation
        log_probabilities = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        start = len(request.context)
        found.append(math.fsum(float(log_probabilities[at - 1, ids[at]]) for at in range(start, len(ids))))
    return found


def flat(values: list[list[float]]) -> list[float]:
    return [value for of_item in values for value in of_item]


SMALL = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = SMALL | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4}
BLOOM = {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4}
EXPERTS = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
STOCK: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rotary positions": ("LlamaForCausalLM", "LlamaConfig", SMALL),
    "absolute positions": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "slopes, and no position_ids": ("BloomForCausalLM", "BloomConfig", BLOOM),
    "a window shorter than contexts": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 5}),
    "experts": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", GROUPED | EXPERTS | {"experts_implementation": "eager"}),
    "a state that choices cannot share": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
}


@pytest.mark.parametrize("kind", list(STOCK))
def test_any_model_scores_as_one_sequence_at_a_time(kind: str) -> None:
    """A wrong mask or position would show in the third digit. In float64 (of which Bloom makes nan) only fp32's
    log-softmax rounds, whatever the batch."""
    model_class, config_class, fields = STOCK[kind]
    torch.manual_seed(1)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields)).eval()
    model = model if model_class == "BloomForCausalLM" else model.double()
    assert _caches_keys_and_values(model) is (model_class != "MambaForCausalLM")
    requests = random_requests(V)
    expected = flat([one_at_a_time(model, request) for request in requests])
    for batch_size in (1, 3, 16):
        found = flat(choice_log_likelihoods(model, requests, batch_size=batch_size))
        assert found == pytest.approx(expected, rel=2e-6)


@pytest.fixture(scope="module")
def requests_of_text(tokenizer: PreTrainedTokenizerBase, documents: Dataset) -> list[ChoiceRequest]:
    texts = documents["text"][:]
    items = [item(text, *(other[:30] for other in texts[:3]), delimiter="\n") for text in texts]
    return choice_requests(tokenizer, items, max_length=64)


def test_our_model_scores_the_same_in_any_batch(model: MoEForCausalLM, requests_of_text: list[ChoiceRequest]) -> None:
    expected = flat([one_at_a_time(model.eval(), request) for request in requests_of_text])
    for batch_size in (1, 3, 16, 1000):
        found = choice_log_likelihoods(model, requests_of_text, batch_size=batch_size)
        assert flat(found) == pytest.approx(expected, rel=2e-6)


def test_a_cut_context_is_read_from_where_it_is_cut(model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    text = "def f1(x):\n    return x + 1\n" * 6
    long = item(text, "def", "loi numéro")
    (whole,) = choice_requests(tokenizer, [long], max_length=500)
    (cut,) = choice_requests(tokenizer, [long], max_length=24)
    assert whole.truncated == 0
    assert cut.truncated == whole.length - 24
    assert cut.length == 24
    assert cut.context == whole.context[cut.truncated :]
    assert cut.continuations == whole.continuations
    with pytest.raises(ValueError, match=r"choices must have at most max_length \(2\) tokens; got \d+ in item 0"):
        choice_requests(tokenizer, [long], max_length=2)


@given(
    context=st.text("ab \nénz数", max_size=12),
    choices=st.lists(st.text("ab \nénz数", min_size=1, max_size=8), min_size=2, max_size=4),
    delimiter=st.sampled_from(["", " ", "\n"]),
    bos=st.booleans(),
)
def test_tokens_are_those_of_the_whole_text_scored_from_one_place(
    context: str, choices: list[str], delimiter: str, bos: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    asked = item(context, *choices, delimiter=delimiter)
    (request,) = choice_requests(tokenizer, [asked], max_length=100, add_bos_token=bos)
    alone = tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"]
    wholes = [tokenizer(context + delimiter + text, add_special_tokens=False)["input_ids"] for text in choices]
    first = 1 if bos or request.context[0] == tokenizer.bos_token_id else 0
    assert request.context[:first] == [tokenizer.bos_token_id] * first
    for whole, continuation in zip(wholes, request.continuations, strict=True):
        assert request.context[first:] + continuation == whole
        assert continuation
    # The context is kept as far as it can be: one token more would not be all texts' own, or leave one without any.
    kept = len(request.context) - first
    if kept < len(alone):
        assert any(whole[: kept + 1] != alone[: kept + 1] or len(whole) == kept + 1 for whole in wholes)
    # Where no token reaches over the boundary, what is scored is what follows the context, as in the harness.
    if all(whole[: len(alone)] == alone and len(whole) > len(alone) for whole in wholes) and (alone or first):
        assert request.continuations == [whole[len(alone) :] for whole in wholes]


def test_an_empty_context_needs_a_token_to_stand_for_it(tokenizer: PreTrainedTokenizerBase) -> None:
    (request,) = choice_requests(tokenizer, [item("", "a", "b", delimiter="")], max_length=9, add_bos_token=False)
    assert request.context == [tokenizer.eos_token_id]
    without = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="tokenizer must have a bos or an eos token"):
        choice_requests(without, [item("", "a", "b", delimiter="")], max_length=9)
    assert choice_requests(without, [item("x", "a", "b")], max_length=9)[0].context  # a context that needs none


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_model_as_it_was(
    model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, requests_of_text: list[ChoiceRequest], training: bool
) -> None:
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choice_log_likelihoods(model, requests_of_text[:3])
    generate_texts(model, tokenizer, [Prompt([5, 6], 0)], Stopping(("\n",), 3))
    assert model.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_refuses_what_is_no_number(model: MoEForCausalLM, requests_of_text: list[ChoiceRequest]) -> None:
    broken = MoEForCausalLM(model.config)
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(
        ValueError, match=r"the model's log-likelihoods must be finite; got \[nan, nan, nan\] for item 0"
    ):
        choice_log_likelihoods(broken, requests_of_text[:2])
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        choice_log_likelihoods(model, requests_of_text, batch_size=0)
    assert choice_log_likelihoods(model, []) == []


TEXTS = ["def f", "Où est la loi", "数は三", "def f1(x):\n    return", "x"]


def greedily(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], stopping: Stopping) -> str:
    """Token by token, without cache or batch."""
    written: list[int] = []
    for _ in range(stopping.max_new_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + written]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
        if token == model.config.eos_token_id:  # another than the tokenizer's, and no special token of it
            break
        text = tokenizer.decode(written, skip_special_tokens=True)
        if any(stop in text for stop in stopping.strings):
            return min((text.partition(stop)[0] for stop in stopping.strings), key=len)
    return tokenizer.decode(written, skip_special_tokens=True)


def test_texts_are_those_written_token_by_token(model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    items = [item(text) for text in TEXTS]
    made = prompts(tokenizer, items, max_length=40, max_new_tokens=12)
    free = [greedily(model.eval(), tokenizer, prompt.tokens, Stopping((), 12)) for prompt in made]
    # What the model does write, so that some texts end before their time and others do not.
    written = re.findall("[!-~]", "".join(free[:2]))
    stops = Stopping((written[0], written[-1]), 12)
    expected = [greedily(model, tokenizer, prompt.tokens, stops) for prompt in made]
    assert 0 < sum(text != whole for text, whole in zip(expected, free, strict=True)) < len(free)
    for batch_size in (1, 2, 16):
        assert generate_texts(model, tokenizer, made, stops, batch_size=batch_size) == expected
    assert generate_texts(model, tokenizer, made, Stopping((), 12)) == free
    assert generate_texts(model, tokenizer, [], stops) == []


def test_prompts_leave_room_for_what_is_written(tokenizer: PreTrainedTokenizerBase) -> None:
    (prompt,) = prompts(tokenizer, [item("def f(x): return x\n" * 9)], max_length=20, max_new_tokens=8)
    whole = [tokenizer.bos_token_id, *tokenizer("def f(x): return x\n" * 9)["input_ids"]]
    assert prompt.tokens == whole[-12:]
    assert prompt.truncated == len(whole) - 12
    with pytest.raises(ValueError, match=r"max_new_tokens must be below max_length \(20\); got 20"):
        prompts(tokenizer, [item("x")], max_length=20, max_new_tokens=20)


def on_one_process(
    rank: int, world_size: int, model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[dict], made: Any
) -> dict[str, Any]:
    """All that is dealt out, as each process returns it."""
    with launched(rank, world_size):
        assert (this_process().process_index, this_process().num_processes) == (rank, world_size)
        assert len(share(range(10))) == len(range(rank, 10, world_size))
        return {
            "choices": choice_log_likelihoods(model, made, batch_size=4),
            "texts": generate_texts(
                model, tokenizer, prompts(tokenizer, [item(text) for text in TEXTS], max_length=40, max_new_tokens=6),
                Stopping(("\n",), 6), batch_size=2,
            ),
            "domains": evaluate_domains(model, tokenizer, Dataset.from_list(rows), block_size=24, batch_size=5),
        }  # fmt: skip


@pytest.mark.processes
def test_one_process_and_three_give_the_same_digits(
    run_processes: Callable[..., list[Any]],
    model: MoEForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Dataset,
    requests_of_text: list[ChoiceRequest],
) -> None:
    """Not approximately: what is computed together does not depend on who computes it. With 18 items, batches of four
    sequences and three processes, the last round is ragged and one process has fewer batches."""
    arguments = (model, tokenizer, documents.to_list(), requests_of_text)
    (alone,) = run_processes(1, on_one_process, *arguments)
    for of_process in run_processes(3, on_one_process, *arguments):
        assert of_process == alone
    assert len(alone["choices"]) == len(requests_of_text)
    assert len(set(flat(alone["choices"]))) > 40
