"""Checkpoints of a run: Orbax, asynchronous and atomic, the latest few and the best.

  DIR/<step>/state   any pytree of arrays
  DIR/<step>/notes   JSON: the data position, early stopping, the best step so far

Both carry checksums of their files; see checked.py.

A step's folder gets its name only when all of it is written, so that a killed save never counts.
A checkpoint that was hurt afterwards is passed over for the newest sound one: its folder gets
another name, DIR/<step>.corrupt-1, and stays for a person to look at.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from gemjax.checkpoint.agreement import texts_of_all
from gemjax.checkpoint.checked import CheckedJson, CheckedState, CorruptError, check_digest
from gemjax.checkpoint.replicas import completed, divided
from gemjax.checkpoint.shards import ShapeError, read_shards

# An array is stored in pieces of at most so much, so that a reader need not hold all of it twice.
PIECE_BYTES = 2**25

TEMPORARY = ".orbax-checkpoint-tmp"  # In the name of a folder that is being written.
REMOVED = ".removed"  # At the end of the name of one that is no longer kept.
CORRUPT = ".corrupt"  # At the end of the name of one that was passed over.

_UNREAD = "unread: "  # In front of what a process says who could not read a checkpoint.


class CheckpointError(RuntimeError):
  """A checkpoint that is missing, cannot be read, or could not be written."""


class Restored(NamedTuple):
  """One checkpoint."""

  step: int
  state: Any
  notes: dict[str, Any]
  passed: tuple[str, ...] = ()  # A sentence for each newer checkpoint that was set aside.


class Checkpoints:
  """Keeps the `keep` latest checkpoints and the best one; the others go when the next save begins.

  One process writes; others may look with `read_only`, which changes nothing in the folder.
  """

  def __init__(self, directory: pathlib.Path, *, keep: int = 1, read_only: bool = False):
    self._directory = pathlib.Path(directory).absolute()
    self._keep, self._read_only = keep, read_only
    self._best: int | None = None
    self._saving = False  # Only who saves knows the best, and thus what may go.
    if read_only:
      if not self._directory.is_dir():
        raise CheckpointError(f"{self._directory} holds no checkpoint; train first")
      return
    options = ocp.CheckpointManagerOptions(
      step_format_fixed_length=9,  # Folders sort by age.
      cleanup_tmp_directories=True,  # Of a writer that was killed.
      async_options=ocp.AsyncOptions(barrier_sync_fn=_wait_for_all),
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.StandardSave, CheckedState())
    registry.add("notes", ocp.args.JsonSave, CheckedJson())
    self._manager = ocp.CheckpointManager(
      self._directory, options=options, handler_registry=registry
    )
    self._removing = ThreadPoolExecutor(1)
    self._clear(REMOVED)

  @property
  def steps(self) -> list[int]:
    """Steps of the complete checkpoints on disk; one that is still being written does not count."""
    return sorted(int(f.name) for f in self._directory.iterdir() if f.name.isdigit())

  def save(self, step: int, state: Any, notes: dict[str, Any], *, best: int | None) -> None:
    """Copies the arrays, then writes them while training goes on; `best` is a step to keep.

    Raises:
      CheckpointError: this or the save before it failed, for example on a full disk.
    """
    self.wait()
    self._best = best
    try:
      args = ocp.args.Composite(state=saved_in_pieces(state), notes=ocp.args.JsonSave(notes))
      self._saving = self._manager.save(step, args=args, force=True)
    except Exception as error:
      raise self._failed(f"saving step {step}", error) from error

  def wait(self) -> None:
    """Returns when every save is on disk; raises CheckpointError if one failed."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._failed("a save", error) from error
    if self._saving and jax.process_index() == 0:
      self._retain()
    self._saving = False

  def notes(self, step: int | None = None) -> dict[str, Any]:
    """The notes of a checkpoint, the latest unless named; raises as `restore`."""
    folder = self._folder(self._known(step, self.steps)) / "notes"
    try:
      check_digest(folder)
    except CorruptError as error:
      raise self._refused(str(error), int(folder.parent.name)) from error
    return _notes(folder.parent)

  def restore(self, like: Any, step: int | None = None) -> Restored:
    """Reads a checkpoint into arrays shaped and placed as `like`; all processes must call it.

    Unless `step` is named it is the newest sound one. All that are newer are set aside, but nothing
    is where none is sound, and nothing by a reader, who is refused at once.

    Args:
      like: Tree of arrays or `jax.ShapeDtypeStruct`.
      step: Step of the checkpoint.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    steps = self._steps_of_first()
    newest, harmed = self._known(step, steps), {}
    passing_over = step is None and not self._read_only
    for found in reversed(steps) if passing_over else [newest]:
      state, harm = self._read(found, like)
      if not harm:
        break
      harmed[found] = harm
    else:
      if passing_over and len(steps) > 1:
        harmed[newest] += f", and no other of the steps {steps} is sound"
      raise self._refused(harmed[newest], newest, anew=passing_over)
    passed = tuple(self._set_aside(s, harmed[s], found) for s in sorted(harmed))
    return Restored(found, state, _notes(self._folder(found)), passed)

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, kind, value, trace) -> None:
    # A save ends only together with all processes: one that has failed waits for none of them.
    if kind is None or jax.process_count() == 1:
      self.close()

  def close(self) -> None:
    """Waits for the last save. It says nothing of a failure, which is for `wait` to tell, so that
    closing never hides the error that led to it; what a failed save left is removed.
    """
    if self._read_only:
      return
    with contextlib.suppress(Exception):
      self._manager.close()
    self._removing.shutdown()
    self._clear(TEMPORARY)

  def _clear(self, mark: str) -> None:
    if jax.process_index() == 0:
      for folder in self._directory.glob(f"*{mark}*"):
        shutil.rmtree(folder, ignore_errors=True)

  def _retain(self) -> None:
    """Removes all but the latest and the best, which is that of the latest.

    A folder loses its name before its files, so that a removal that is killed leaves no half
    checkpoint; Orbax's own does.
    """
    steps = self.steps
    for step in sorted(set(steps) - {*steps[-self._keep :], self._best}):
      folder = self._folder(step)
      gone = folder.rename(folder.with_name(folder.name + REMOVED))
      self._removing.submit(shutil.rmtree, gone, ignore_errors=True)

  def _folder(self, step: int) -> pathlib.Path:
    return self._directory / f"{step:09d}"

  def _steps_of_first(self) -> list[int]:
    """`steps` as the first process sees them: shared disks may show others something else."""
    newest = self.steps[-50:]  # Of what fits a text.
    return [int(step) for step in texts_of_all(" ".join(map(str, newest)))[0].split()]

  def _known(self, step: int | None, steps: list[int]) -> int:
    if not steps:
      raise CheckpointError(f"{self._directory} holds no checkpoint; train first")
    if step is None:
      return steps[-1]
    if step not in steps:
      raise CheckpointError(
        f"{self._directory} has no checkpoint of step {step}, only of {steps}; name one of them"
      )
    return step

  def _read(self, step: int, like: Any) -> tuple[Any, str]:
    """(state, what is wrong with the checkpoint), the latter alike on all processes; each of them
    checks its part of all files while it reads its part of its shards: the disk is asked once.
    """
    folder, state, failure = self._folder(step), None, None
    with ThreadPoolExecutor(1) as pool:
      checked = pool.submit(_harm, folder, jax.process_index(), jax.process_count())
      try:
        state = read_shards(folder / "state", divided(like))
      except Exception as error:
        failure = error  # Of what is no longer as it was written, or of another run.
      said = texts_of_all(checked.result() or (f"{_UNREAD}{_brief(failure)}" if failure else ""))
    if harm := next((text for text in said if text and not text.startswith(_UNREAD)), ""):
      return None, harm
    if isinstance(failure, ShapeError):
      raise CheckpointError(
        f"{_brief(failure)}; the checkpoint is of another shape than this run, name another folder"
      ) from failure
    if unread := next(filter(None, said), ""):
      raise CheckpointError(
        f"{folder} could not be read ({unread.removeprefix(_UNREAD)}); mend that, then the same "
        "command tries again"
      ) from failure
    return completed(state, like), ""

  def _set_aside(self, step: int, harm: str, sound: int) -> str:
    """Frees the name of a corrupt checkpoint, which would count as the latest, and says so."""
    folder, name = self._folder(step), ""
    if jax.process_index() == 0:
      names = (f"{folder.name}{CORRUPT}-{n}" for n in itertools.count(1))
      name = next(name for name in names if not folder.with_name(name).exists())
      try:
        folder.rename(folder.with_name(name))
      except OSError as error:
        raise CheckpointError(
          f"{harm}, and {folder} cannot be renamed ({error.strerror}); move it away to go on from "
          f"step {sound:,}"
        ) from error
    name = texts_of_all(name)[0]  # No process looks before the first is done.
    self._manager.reload()
    return f"{harm}: step {step:,} is set aside as {name}, and training goes on from step {sound:,}"

  def _refused(self, harm: str, step: int, *, anew: bool = False) -> CheckpointError:
    others = [s for s in self.steps if s != step]
    if others and not anew:
      return CheckpointError(f"{harm}; choose another of the steps {others}")
    return CheckpointError(f"{harm}; delete {self._directory} to train anew")

  def _failed(self, what: str, error: Exception) -> CheckpointError:
    left = f"the last complete one is step {self.steps[-1]}" if self.steps else "none is complete"
    return CheckpointError(
      f"{what} to {self._directory} failed ({_brief(error)}); {left}; free the disk, then the same "
      "command goes on from there"
    )


def _wait_for_all(*, key: str, timeout_ms: int) -> None:
  """Orbax's barrier, in threads of a save; but not for a save that is failing in this very process,
  while the others wait for it elsewhere: that would hide the reason for 20 minutes.
  """
  if error := sys.exc_info()[1]:
    raise error
  ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _harm(folder: pathlib.Path, part: int, parts: int) -> str:
  """What is wrong with this part of a checkpoint, or why nobody knows; empty if it is sound."""
  try:
    for item in ("notes", "state"):
      check_digest(folder / item, part, parts)
  except CorruptError as error:
    return str(error)
  except OSError as error:
    return f"{_UNREAD}{error}"
  return ""


def _notes(folder: pathlib.Path) -> dict[str, Any]:
  return json.loads((folder / "notes" / "metadata").read_text())


def saved_in_pieces(state: Any, piece_bytes: int = PIECE_BYTES) -> ocp.args.StandardSave:
  """How Orbax is asked to store a tree of arrays, none of them empty."""
  pieces = lambda x: ocp.SaveArgs(chunk_byte_size=piece_bytes if x.shape else None)
  return ocp.args.StandardSave(state, save_args=jax.tree.map(pieces, state))


def _brief(error: Exception) -> str:
  """The ends of the first line: TensorStore puts the file first, the reason last, pages between."""
  line = (str(error).strip() or type(error).__name__).splitlines()[0]
  return line if len(line) <= 200 else f"{line[:80]} ... {line[-120:]}"
