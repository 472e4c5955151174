"""From and to the Hub: conversion, upcycling, the model card, publishing, and what a preset needs of memory."""

from .conversion import convert

__all__ = ["convert"]
