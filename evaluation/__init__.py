"""How good a model is: bits per byte and perplexity by domain."""

from .perplexity import evaluate_domains

__all__ = ["evaluate_domains"]
