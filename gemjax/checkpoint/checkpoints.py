"""Checkpoints of a run: Orbax, asynchronous and atomic, the latest few and the best.

  DIR/<step>/state   any pytree of arrays
  DIR/<step>/notes   JSON: the data position, early stopping, the best step so far

A step's folder gets its name only when all of it is written, so that a killed save never counts.
"""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers


class CheckpointError(RuntimeError):
  """A checkpoint that is missing, cannot be read, or could not be written."""


class Restored(NamedTuple):
  """One checkpoint."""

  step: int
  state: Any
  notes: dict[str, Any]


class _Best(checkpoint_managers.PreservationPolicy):
  """Preserves the step that its owner calls the best."""

  step: int | None = None

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    return [c.step == self.step for c in checkpoints]


class Checkpoints:
  """Keeps the `keep` latest checkpoints and the best one."""

  def __init__(self, directory: pathlib.Path, *, keep: int):
    self._directory = pathlib.Path(directory).absolute()
    self._best = _Best()
    options = ocp.CheckpointManagerOptions(
      preservation_policy=checkpoint_managers.AnyPreservationPolicy(
        [checkpoint_managers.LatestN(keep), self._best]
      ),
      step_format_fixed_length=9,  # Folders sort by age.
      enable_async_checkpointing=True,
      cleanup_tmp_directories=True,
    )
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=options,
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "notes": ocp.JsonCheckpointHandler(),
      },
    )

  @property
  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any, notes: dict[str, Any], *, best: int | None) -> None:
    """Copies the arrays, then writes them while training goes on; `best` is a step to keep.

    Raises:
      CheckpointError: this or the save before it failed, for example on a full disk.
    """
    self._best.step = best
    try:
      args = ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes))
      self._manager.save(step, args=args, force=True)
    except Exception as error:
      raise CheckpointError(self._failed(step, error)) from error

  def wait(self) -> None:
    """Returns when every save is on disk; raises CheckpointError if one failed."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise CheckpointError(self._failed(None, error)) from error

  def restore(self, like: Any, step: int | None = None) -> Restored:
    """Reads a checkpoint, the latest unless named, into arrays shaped and placed as `like`.

    Args:
      like: Tree of arrays or `jax.ShapeDtypeStruct`.
      step: Step of the checkpoint.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    steps = self.steps
    if not steps:
      raise CheckpointError(f"{self._directory} holds no checkpoint; train first")
    if step is None:
      step = steps[-1]
    if step not in steps:
      raise CheckpointError(f"{self._directory} has no checkpoint of step {step}, only of {steps}")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract), notes=ocp.args.JsonRestore()
        ),
      )
    except Exception as error:
      older = [s for s in steps if s < step]
      mend = f"delete that folder to go on from step {older[-1]}" if older else "train anew"
      first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
      folder = self._directory / f"{step:09d}"
      raise CheckpointError(f"{folder} is corrupt or of another shape ({first}); {mend}") from error
    return Restored(step, restored["state"], restored["notes"])

  def close(self) -> None:
    self._manager.close()

  def _failed(self, step: int | None, error: Exception) -> str:
    what = "a save" if step is None else f"saving step {step}"
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    left = f"the last complete one is step {self.steps[-1]}" if self.steps else "none is complete"
    return f"{what} to {self._directory} failed ({first}); is the disk full? {left}"
