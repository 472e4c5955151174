"""Templates over the columns of one row: Jinja2 in a sandbox, with the one filter that lm-evaluation-harness adds."""

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, Undefined, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment


def _regex_replace(text: str, pattern: str, replacement: str, count: int = 0) -> str:
    return re.sub(pattern, replacement, text, count=count)


# A task file may come from anyone: a template can neither reach Python's internals nor change its row.
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_ENVIRONMENT.filters["regex_replace"] = _regex_replace


class Template:
    """Text with `{{ expressions }}`, rendered for a row.

    Raises:
        ValueError: it is no Jinja2; when called, the row does not suit it.
    """

    def __init__(self, source: str) -> None:
        try:
            self.columns = frozenset(meta.find_undeclared_variables(_ENVIRONMENT.parse(source)))
            """The columns it reads."""
            self._compiled = _ENVIRONMENT.from_string(source)
        except TemplateError as error:
            raise ValueError(str(error)) from error

    def __call__(self, row: Mapping[str, Any]) -> str:
        return _evaluated(self._compiled.render, row)


class Expression:
    """One Jinja2 expression, which gives a value of any kind for a row.

    Raises:
        ValueError: it is no Jinja2; when called, the row does not suit it.
    """

    def __init__(self, source: str) -> None:
        try:
            self.columns = frozenset(meta.find_undeclared_variables(_ENVIRONMENT.parse("{{ (" + source + ") }}")))
            """The columns it reads."""
            self._compiled = _ENVIRONMENT.compile_expression(source, undefined_to_none=False)
        except TemplateError as error:
            raise ValueError(str(error)) from error

    def __call__(self, row: Mapping[str, Any]) -> Any:
        value = _evaluated(self._compiled, row)
        if isinstance(value, Undefined):
            raise ValueError(value._undefined_message)
        return value


def _evaluated(compiled: Any, row: Mapping[str, Any]) -> Any:
    try:
        return compiled(**row)
    # what expressions raise on values that do not suit them, beside Jinja2's own
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, re.error) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
