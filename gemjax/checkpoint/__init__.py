"""Saving and restoring any pytree."""

from gemjax.checkpoint.checkpoints import CheckpointError, Checkpoints, Restored
from gemjax.checkpoint.snapshots import Snapshots

__all__ = ["CheckpointError", "Checkpoints", "Restored", "Snapshots"]
