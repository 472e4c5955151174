"""LoRA on the router itself: the selection bias is saved and loaded with the adapter.

PEFT saves what the modules of an adapter hold, while the bias is the base model's, and moves there. Whoever asks for
the model's state therefore finds it under the adapter's name too.
"""

from typing import Any

from torch import Tensor, nn
from transformers.utils import is_peft_available

from .router import MoERouter

BIAS = "e_score_correction_bias"
# The part of PEFT's LoRA layers that has a place for each adapter and, on a parameter, holds nothing.
PLACE = "lora_dropout"


def biases_of_adapters(model: nn.Module) -> dict[str, Tensor]:
    """The biases of routers under LoRA, fp32 `[E]`, by the name that makes PEFT save them."""
    biases = {}
    for name, router in model.named_modules():
        if isinstance(router, MoERouter) and name.endswith(".base_layer"):
            place = f"{name.removesuffix('.base_layer')}.{PLACE}"
            for adapter, module in model.get_submodule(place).named_children():
                bias = getattr(router, BIAS)
                biases[f"{place}.{adapter}.{BIAS}"] = bias
                # No buffer, which would be another one after a move: torch's distributed checkpoints look names up.
                module.__dict__[BIAS] = bias
    return biases


def read_adapter(name: str, asked: dict[str, Any]) -> dict[str, Tensor]:
    """What PEFT has saved of an adapter, in a folder or on the Hub: there as `asked` (`revision`, `token`, ...)."""
    if is_peft_available():  # Transformers asks for all that remote code imports otherwise
        from peft.utils.save_and_load import load_peft_weights

    places = ("revision", "token", "cache_dir", "subfolder")
    return load_peft_weights(name, device="cpu", **{place: asked[place] for place in places if asked.get(place)})


def load_biases(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Take the biases from what PEFT has saved of an adapter: Transformers' own loader leaves them out."""
    for name, bias in state.items():
        if name.endswith(f".{PLACE}.{BIAS}"):
            layer = name.removeprefix("base_model.model.").removesuffix(f".{PLACE}.{BIAS}")
            getattr(model.get_submodule(f"{layer}.base_layer"), BIAS).copy_(bias)


def return_biases(state: dict[str, Tensor]) -> None:
    """Rename what `biases_of_adapters` named to what it is in the base model; changes `state`."""
    for name in [name for name in state if f".{PLACE}." in name and name.endswith(BIAS)]:
        layer = name.partition(f".{PLACE}.")[0]
        state[f"{layer}.base_layer.{BIAS}"] = state.pop(name)
