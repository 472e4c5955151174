"""The code that travels with the weights: any process with torch and Transformers alone can then load them.

Transformers loads remote code from one flat folder, and finds the files by their relative imports. So each module
that the models are made of is written beside the weights under its own name, its imports of other rooms
(`from ..room.module import name`) rewritten to `from .module import name`; such a module therefore imports modules,
never a whole room. What was loaded as remote code, Transformers itself copies when it is saved again.
"""

import json
import os
import re
from pathlib import Path

from huggingface_hub.constants import CONFIG_NAME

# Where each Auto class finds its class.
AUTO_MAP = {
    "AutoConfig": "configuration_moe.MoEConfig",
    "AutoModel": "modeling_moe.MoEModel",
    "AutoModelForCausalLM": "modeling_moe.MoEForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_moe.MoEForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_moe.MoEForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_moe.MoEForTokenClassification",
}

MODULES = (
    "configuration/balancing_settings.py",
    "configuration/configuration_moe.py",
    "configuration/remote_code.py",
    "balancing/balancer.py",
    "balancing/bias_updates.py",
    "balancing/imbalance.py",
    "balancing/load.py",
    "balancing/losses.py",
    "balancing/quantile.py",
    "balancing/synchronizer.py",
    "modeling/adapters.py",
    "modeling/block_causal_attention.py",
    "modeling/expert_products.py",
    "modeling/experts.py",
    "modeling/experts_interface.py",
    "modeling/fused_head.py",
    "modeling/linear.py",
    "modeling/linear_cross_entropy.py",
    "modeling/matrix_products.py",
    "modeling/modeling_moe.py",
    "modeling/norm.py",
    "modeling/rotary.py",
    "modeling/router.py",
)


def copy_remote_code(folder: Path) -> None:
    """Write the modules flat into `folder`, each whole or not at all; nothing where this is such a copy itself."""
    package = Path(__file__).parents[1]
    if not (package / MODULES[0]).is_file():
        return
    for module in MODULES:
        source = (package / module).read_text(encoding="utf-8")
        flat = re.sub(r"^from \.\.\w+\.(\w+) import", r"from .\1 import", source, flags=re.MULTILINE)
        _write_whole(folder / Path(module).name, flat)


def write_remote_code(folder: Path) -> None:
    """Make a saved model's folder carry its code: the modules, and in `config.json` where the Auto classes find it."""
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    copy_remote_code(folder)
    config["auto_map"] = AUTO_MAP
    _write_whole(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_whole(path: Path, text: str) -> None:
    # As `data.write_whole`, which this file cannot import: it travels too.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
