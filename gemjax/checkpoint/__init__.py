"""Saving and restoring any pytree."""

from gemjax.checkpoint.checkpoints import CheckpointError, Checkpoints, Restored

__all__ = ["CheckpointError", "Checkpoints", "Restored"]
