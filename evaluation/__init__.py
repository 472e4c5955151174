"""How good a model is: bits per byte and perplexity by domain, and whether two models differ."""

from .comparison import Scores, bootstrap_interval, compare, holm, paired_p_value
from .perplexity import evaluate_domains

__all__ = ["Scores", "bootstrap_interval", "compare", "evaluate_domains", "holm", "paired_p_value"]
