"""Files that others wrote: whatever is wrong in one is said with its name and the field's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

_KINDS = {dict: "a mapping", list: "a list", str: "text", int: "a whole number", float: "a number"}

Config = TypeVar("Config", bound=PreTrainedConfig)


def read_mapping(file: Path) -> dict[str, Any]:
    """A mapping from a JSON or YAML file.

    Raises:
        ValueError: the file holds something else.
    """
    language = file.suffix[1:].upper()
    try:
        text = file.read_text(encoding="utf-8")
        found = yaml.safe_load(text) if language == "YAML" else json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} must hold {language}; got {_one_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a mapping; got {found!s:.80}")
    return found


def read_config(config_class: type[Config], folder: Path) -> Config:
    """A model's configuration.

    Raises:
        ValueError: config.json holds a value that its class refuses, or stumbles over.
    """
    try:
        return config_class.from_pretrained(folder)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{folder / CONFIG_NAME} must be of {config_class.model_type}; got {_one_line(error)}"
        ) from error


def check_fields(value: Any, form: Any, where: str) -> None:
    """Hold a value read from a file against a form.

    Args:
        form: a mapping of names to forms (`"*"`: any name, `"name?"`: may be missing or null), a list of one form, or
            the types a value may have (of `_KINDS`). What a mapping holds besides is passed over.
        where: the file, and the field within it.

    Raises:
        ValueError: a field is missing, or of another type.
    """
    if isinstance(form, Mapping):
        check_fields(value, dict, where)
        for name, part in form.items():
            key = name.removesuffix("?")
            if name == "*":
                for each, found in value.items():
                    check_fields(found, part, f"{where} {each}")
            elif value.get(key) is not None or not name.endswith("?"):
                if key not in value:
                    raise ValueError(f"{where} must hold {key}; got none")
                check_fields(value[key], part, f"{where} {key}")
    elif isinstance(form, list):
        check_fields(value, list, where)
        for place, found in enumerate(value):
            check_fields(found, form[0], f"{where}[{place}]")
    elif not isinstance(value, form):
        kinds = form if isinstance(form, tuple) else (form,)
        raise ValueError(f"{where} must be {' or '.join(_KINDS[kind] for kind in kinds)}; got {value!s:.80}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


__all__ = ["check_fields", "read_config", "read_mapping"]
