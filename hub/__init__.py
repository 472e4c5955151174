"""From and to the Hub: conversion, upcycling, the model card, publishing, and what a preset needs of memory."""

from .conversion import convert
from .upcycling import upcycle

__all__ = ["convert", "upcycle"]
