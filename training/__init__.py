"""The training loop and what it keeps of a run."""

from .checkpoints import Checkpoint, CheckpointError, Checkpoints
from .interruption import RESUME_ME
from .loop import train
from .run_directory import RunDirectory

__all__ = ["RESUME_ME", "Checkpoint", "CheckpointError", "Checkpoints", "RunDirectory", "train"]
