"""Checkpoints of a run: Orbax, asynchronous and atomic, the latest few and the best.

  DIR/<step>/state   any pytree of arrays
  DIR/<step>/notes   JSON: the data position, early stopping, the best step so far

Both carry checksums of their files; see checked.py.

A step's folder gets its name only when all of it is written, so that a killed save never counts.
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from gemjax.checkpoint.checked import CheckedJson, CheckedState, CorruptError

# An array is stored in pieces of at most so much, so that a reader need not hold all of it twice.
PIECE_BYTES = 2**25

TEMPORARY = ".orbax-checkpoint-tmp"  # In the name of a folder that is being written.


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
  """Keeps the `keep` latest checkpoints and the best one.

  One process writes; others may look with `read_only`, which changes nothing in the folder.
  """

  def __init__(self, directory: pathlib.Path, *, keep: int = 1, read_only: bool = False):
    self._directory = pathlib.Path(directory).absolute()
    self._best = _Best()
    self._read_only = read_only
    options = ocp.CheckpointManagerOptions(
      preservation_policy=checkpoint_managers.AnyPreservationPolicy(
        [checkpoint_managers.LatestN(keep), self._best]
      ),
      step_format_fixed_length=9,  # Folders sort by age.
      enable_async_checkpointing=not read_only,
      cleanup_tmp_directories=not read_only,  # Of a writer that was killed.
      create=not read_only,
      read_only=read_only,
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    state, notes = CheckedState(), CheckedJson()
    for name, args, handler in (
      ("state", ocp.args.StandardSave, state),
      ("state", ocp.args.StandardRestore, state),
      ("notes", ocp.args.JsonSave, notes),
      ("notes", ocp.args.JsonRestore, notes),
    ):
      registry.add(name, args, handler)
    if read_only and not self._directory.is_dir():
      raise CheckpointError(f"{self._directory} holds no checkpoint; train first")
    self._manager = ocp.CheckpointManager(
      self._directory, options=options, handler_registry=registry
    )

  @property
  def steps(self) -> list[int]:
    """Steps of the complete checkpoints on disk; one that is still being written does not count."""
    return sorted(int(f.name) for f in self._directory.iterdir() if f.name.isdigit())

  def save(self, step: int, state: Any, notes: dict[str, Any], *, best: int | None) -> None:
    """Copies the arrays, then writes them while training goes on; `best` is a step to keep.

    Raises:
      CheckpointError: this or the save before it failed, for example on a full disk.
    """
    self._best.step = best
    try:
      args = ocp.args.Composite(state=saved_in_pieces(state), notes=ocp.args.JsonSave(notes))
      self._manager.save(step, args=args, force=True)
    except Exception as error:
      raise self._failed(f"saving step {step}", error) from error

  def wait(self) -> None:
    """Returns when every save is on disk; raises CheckpointError if one failed."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._failed("a save", error) from error

  def notes(self, step: int | None = None) -> dict[str, Any]:
    """The notes of a checkpoint, the latest unless named; raises as `restore`."""
    return self._read(self._known(step), notes=ocp.args.JsonRestore())["notes"]

  def restore(self, like: Any, step: int | None = None) -> Restored:
    """Reads a checkpoint, the latest unless named, into arrays shaped and placed as `like`.

    Args:
      like: Tree of arrays or `jax.ShapeDtypeStruct`.
      step: Step of the checkpoint.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    step = self._known(step)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    restored = self._read(
      step, state=ocp.args.StandardRestore(abstract), notes=ocp.args.JsonRestore()
    )
    return Restored(step, restored["state"], restored["notes"])

  def close(self) -> None:
    """Waits for the last save. It says nothing of a failure, which is for `wait` to tell, so that
    closing never hides the error that led to it; what a failed save left is removed.
    """
    with contextlib.suppress(Exception):
      self._manager.close()
    if not self._read_only and jax.process_index() == 0:
      for folder in self._directory.glob(f"*{TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)

  def _known(self, step: int | None) -> int:
    steps = self.steps
    if not steps:
      raise CheckpointError(f"{self._directory} holds no checkpoint; train first")
    if step is None:
      return steps[-1]
    if step not in steps:
      raise CheckpointError(f"{self._directory} has no checkpoint of step {step}, only of {steps}")
    return step

  def _read(self, step: int, **items: ocp.args.CheckpointArgs) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:
      others = [s for s in self.steps if s < step or (self._read_only and s > step)]
      folder = self._directory / f"{step:09d}"
      mend = f"delete {folder} to go on from step {others[-1]}" if others else "train anew"
      if self._read_only:
        mend = f"choose another of the steps {others}" if others else mend
      what = "" if isinstance(error, CorruptError) else f"{folder} is corrupt or of another shape: "
      raise CheckpointError(f"{what}{_brief(error)}; {mend}") from error

  def _failed(self, what: str, error: Exception) -> CheckpointError:
    left = f"the last complete one is step {self.steps[-1]}" if self.steps else "none is complete"
    return CheckpointError(
      f"{what} to {self._directory} failed ({_brief(error)}); {left}; free the disk, then the same "
      "command goes on from there"
    )


def saved_in_pieces(state: Any, piece_bytes: int = PIECE_BYTES) -> ocp.args.StandardSave:
  """How Orbax is asked to store a tree of arrays, none of them empty."""
  pieces = lambda x: ocp.SaveArgs(chunk_byte_size=piece_bytes if x.shape else None)
  return ocp.args.StandardSave(state, save_args=jax.tree.map(pieces, state))


def _brief(error: Exception) -> str:
  """The ends of the first line: TensorStore puts the file first, the reason last, pages between."""
  line = (str(error).strip() or type(error).__name__).splitlines()[0]
  return line if len(line) <= 200 else f"{line[:80]} ... {line[-120:]}"
