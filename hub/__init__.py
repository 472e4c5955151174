"""From and to the Hub: conversion, upcycling, the model card, publishing."""

from .conversion import convert
from .model_card import write_model_card
from .publishing import (
    PublishingError,
    assemble,
    check_repo,
    contents,
    find_model,
    find_token,
    link_or_copy,
    push,
    symlink,
)
from .upcycling import upcycle

__all__ = [
    "PublishingError",
    "assemble",
    "check_repo",
    "contents",
    "convert",
    "find_model",
    "find_token",
    "link_or_copy",
    "push",
    "symlink",
    "upcycle",
    "write_model_card",
]
