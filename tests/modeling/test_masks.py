"""What counts as a token under every mask, and when only positions that bear loss are to be balanced."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise import MoEConfig, MoEForCausalLM

Make = Callable[..., MoEConfig]
LENGTHS = torch.tensor([8, 5, 1])


def batch(side: str = "right") -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, 64, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(8) < LENGTHS[:, None]
    if side == "left":
        mask = mask.flip(-1)
    return ids, mask


def build(tiny_config: Make, **changes: Any) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(router_aux_loss_coef=1.0, **changes)).train()


def balance(model: MoEForCausalLM, **inputs: Any) -> tuple[Tensor, float, Tensor]:
    """Load, balancing loss and the gradient it alone gives the first router."""
    model.zero_grad()
    outputs = model(**inputs, use_cache=False)
    outputs.aux_loss.backward()
    model.balancer.after_optimizer_step()
    return (
        model.balancer.metrics()["load"],
        outputs.aux_loss.item(),
        model.model.layers[1].mlp.gate.weight.grad.clone(),
    )


def by_hand(model: MoEForCausalLM, kept: Tensor, **inputs: Any) -> Tensor:
    """Selections at the positions `kept` `[B, T]`, of the same forward pass in evaluation."""
    with torch.no_grad():
        outputs = model.eval()(**inputs, output_router_logits=True, use_cache=False)
    model.train()
    return torch.stack(
        [experts[kept.flatten()].flatten().bincount(minlength=8) for experts in outputs.selected_experts]
    )


def causal(mask: Tensor, kind: str) -> Tensor:
    """A 4-D mask in which a padded position attends to nothing and nothing attends to it."""
    allowed = (mask[:, None, :] & mask[:, :, None] & torch.ones(8, 8).tril().bool())[:, None]
    if kind == "boolean":
        return allowed
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["2-D", "boolean", "additive"])
def test_padding_is_left_out_under_any_mask(tiny_config: Make, side: str, kind: str) -> None:
    model = build(tiny_config)
    ids, mask = batch(side)
    attention_mask = mask.long() if kind == "2-D" else causal(mask, kind)
    inputs = {"input_ids": ids, "attention_mask": attention_mask}
    load, *_ = balance(model, **inputs)
    assert load.sum(-1).tolist() == [14 * 2] * 2
    assert torch.equal(load, by_hand(model, mask, **inputs))
    # The same rows as embeddings.
    embedded = {"inputs_embeds": model.model.embed_tokens(ids).detach(), "attention_mask": attention_mask}
    assert torch.equal(balance(model, **embedded)[0], load)


def test_4d_masks_give_the_loss_of_2d_masks(tiny_config: Make) -> None:
    model = build(tiny_config)
    ids, mask = batch()
    _, loss, gradient = balance(model, input_ids=ids, attention_mask=mask.long())
    for kind in ("boolean", "additive"):
        _, again, gradient_again = balance(model, input_ids=ids, attention_mask=causal(mask, kind))
        assert again == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(gradient_again, gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_count_like_documents_apart(tiny_config: Make, attention: str) -> None:
    model = build(tiny_config, attn_implementation=attention)
    ids, mask = batch()
    packed = torch.cat([row[:length] for row, length in zip(ids, LENGTHS, strict=True)])[None]
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    together = balance(model, input_ids=packed, position_ids=position_ids)
    apart = balance(model, input_ids=ids, attention_mask=mask.long())
    assert torch.equal(together[0], apart[0])
    assert together[1] == pytest.approx(apart[1], rel=1e-5)
    torch.testing.assert_close(together[2], apart[2], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("attention_mask", [True, False])
def test_only_positions_that_bear_loss_are_balanced(tiny_config: Make, attention_mask: bool) -> None:
    model = build(tiny_config, balanced_positions="labels")
    ids, mask = batch()
    labels = ids.masked_fill(~mask, -100)
    labels[0, :4] = -100  # a prompt
    bears_loss = torch.nn.functional.pad(labels[:, 1:].ne(-100), (0, 1))
    inputs = {"input_ids": ids} | ({"attention_mask": mask.long()} if attention_mask else {})
    load, *_ = balance(model, **inputs, labels=labels)
    assert load.sum(-1).tolist() == [int(bears_loss.sum()) * 2] * 2
    assert torch.equal(load, by_hand(model, bears_loss, **inputs))
    # Labels shifted beforehand name the positions themselves.
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    assert torch.equal(balance(model, **inputs, labels=labels, shift_labels=shifted)[0], load)
    with pytest.raises(ValueError, match="labels must be given when balanced_positions is labels; got none"):
        model(ids)


def test_more_padding_changes_nothing(tiny_config: Make) -> None:
    # Sequence parallelism pads to a multiple of the ranks; the stock loss then leans to what padding selects.
    model = build(tiny_config)
    ids, mask = batch()
    loss = balance(model, input_ids=ids, attention_mask=mask.long())
    wider = {
        "input_ids": torch.nn.functional.pad(ids, (0, 6)),
        "attention_mask": torch.nn.functional.pad(mask.long(), (0, 6)),
    }
    again = balance(model, **wider)
    assert torch.equal(loss[0], again[0])
    assert again[1] == pytest.approx(loss[1], rel=1e-5)
    torch.testing.assert_close(again[2], loss[2], atol=1e-6, rtol=1e-4)
