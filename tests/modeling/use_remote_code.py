"""Loads a model where equipoise is not installed, and does what a user does: `python FILE MODEL RESULT AGAIN`."""

import sys
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification


def use(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Logits, what is generated, and a training step with balancing: losses, gradients, load, biases."""
    with torch.no_grad():
        logits = model.eval()(ids).logits
    mask = torch.ones_like(ids)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    outputs = model.train()(input_ids=ids, labels=ids)
    outputs.loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    model.balancer.after_optimizer_step()
    return {
        "logits": logits,
        "generated": generated,
        "loss": outputs.loss.detach(),
        "aux_loss": outputs.aux_loss.detach(),
        "gradients": gradients,
        "load": model.balancer.metrics()["load"],
        "biases": torch.stack(model.selection_biases()),
    }


if __name__ == "__main__":
    folder, result, again = sys.argv[1:]
    assert find_spec("equipoise") is None
    ids = torch.arange(2, 26).reshape(2, 12)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    used = use(model, ids)
    model.save_pretrained(again)
    for auto in (AutoModel, AutoModelForSequenceClassification):
        assert type(auto.from_pretrained(folder, trust_remote_code=True)).__module__.startswith(
            "transformers_modules."
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    torch.save(used, result)
