"""The training loop and what it keeps of a run."""

from .loop import train
from .run_directory import RunDirectory

__all__ = ["RunDirectory", "train"]
