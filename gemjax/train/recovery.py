"""What a run that was interrupted goes on from: checkpoints, which last, on a disk that all hosts
share, and if the config asks for them snapshots between two of those, on each host's own.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gemjax import config as config_lib
from gemjax.parallel.arrays import of_all_processes
from gemjax.train.workdir import CHECKPOINTS, Workdir, saved_steps

if TYPE_CHECKING:
  from gemjax.checkpoint import Checkpoints, Restored, Snapshots

LATEST = "latest"  # Of a snapshot's notes: the step of the newest checkpoint when it was taken.


class Recovery:
  """Of one run; a context. All processes must call every method alike.

  Args:
    config: Of checkpoints.
    folder: Of the run.
    say: Is told in sentences what is gone on from, and what is not.
  """

  def __init__(self, config: config_lib.Checkpoint, folder: Workdir, say: Callable[[str], None]):
    self._config, self._folder, self._say = config, folder, say
    self._open = contextlib.ExitStack()
    self._taken: int | None = None  # The snapshot that this run went on from.
    self._forgotten = False

  def __enter__(self) -> Recovery:
    return self

  def __exit__(self, *error) -> bool | None:
    return self._open.__exit__(*error)

  @functools.cached_property
  def checkpoints(self) -> Checkpoints:
    """Opened when a state is first restored or saved: Orbax takes a third of a second to import."""
    from gemjax.checkpoint import Checkpoints

    checkpoints = Checkpoints(self._folder.path / CHECKPOINTS, keep=self._config.keep)
    return self._open.enter_context(checkpoints)

  @functools.cached_property
  def snapshots(self) -> Snapshots | None:
    """Of this life of the run, if it takes any."""
    if not self._config.local:
      return None
    from gemjax.checkpoint import Snapshots

    life = int(of_all_processes(np.array([self._folder.life]))[0])
    directory = pathlib.Path(self._config.local) / f"{self._folder.path.name}-{life:08x}"
    # Each process speaks for its own disk.
    say = self._say if self._folder.first else functools.partial(print, flush=True)
    return self._open.enter_context(contextlib.closing(Snapshots(directory, say)))

  @functools.cached_property
  def _saved(self) -> int:
    """The step of the newest checkpoint when the run started; -1: there was none."""
    newest = (saved_steps(self._folder.path) or [-1])[-1]
    return int(of_all_processes(np.array([newest])).max())

  @functools.cached_property
  def _newer(self) -> list[int]:
    """Steps of the snapshots that were newer than that, the newest first; those alone that go on
    from checkpoints which are still there.
    """
    steps = self.snapshots.steps(self._saved) if self.snapshots else []
    return [step for step in steps if self._has_its_past(step)]

  def _has_its_past(self, step: int) -> bool:
    """Whether nothing that a run needs behind this snapshot was removed, as by a person who wants
    to go on from an older checkpoint.
    """
    notes = self.snapshots.notes(step)
    if notes is None:  # Corrupt: to be told when it is read.
      return True
    saved = set(saved_steps(self._folder.path))
    needed = {notes[LATEST], notes["best"]["step"]} - {None, *saved}
    gone = int(of_all_processes(np.array([max(needed, default=-1)])).max())
    if gone >= 0:
      self._say(
        f"the checkpoint of step {gone:,} is gone: the local snapshot of step {step:,}, which was "
        "taken behind it, is passed over"
      )
    return gone < 0

  def likely_notes(self) -> dict[str, Any] | None:
    """Those of what `restore` will find, if it is sound; the same for all processes."""
    if self._newer:
      return self.snapshots.notes(self._newer[0])
    if self._saved < 0:
      return None
    from gemjax.checkpoint import CheckpointError

    try:
      notes = self.checkpoints.notes()
      step = self.checkpoints.steps[-1]
    except CheckpointError:  # Another one will do.
      notes, step = {}, -1
    seen = of_all_processes(np.array([step]))
    # Disks may show processes different things.
    return None if step < 0 or seen.min() < seen.max() else notes

  def restore(self, like: Callable[[], Any]) -> Restored | None:
    """The newest state that is sound, if there is any, shaped and placed as `like()`.

    Raises:
      CheckpointError: there are checkpoints, none of which can be read.
    """
    restored, kind = None, "local snapshot"
    if self._newer:
      restored, passed = self.snapshots.restore(like(), self._newer)
      self._taken = restored and restored.step
      for line in passed:
        self._say(line)
    if restored is None and self._saved >= 0:
      restored, kind = self.checkpoints.restore(like()), "checkpoint"
    if restored:
      for line in (*restored.passed, f"resuming from the {kind} of step {restored.step:,}"):
        self._say(line)
    return restored

  def save(self, step: int, state: Any, notes: dict[str, Any], *, best: int | None) -> None:
    """A checkpoint; raises CheckpointError if it or the one before it failed."""
    self._forget_others()
    self.checkpoints.save(step, state, notes, best=best)

  def snapshot(self, step: int, state: Any, notes: dict[str, Any], *, best: int | None) -> None:
    """A snapshot, unless the best checkpoint is still being written: what goes on from there would
    miss it in the end.
    """
    first, saved = self._folder.first, saved_steps(self._folder.path)
    there = best is None or not first or best in saved
    if of_all_processes(np.array([there])).all():
      self._forget_others()
      self.snapshots.save(step, state, notes | {LATEST: saved[-1] if saved else None})

  def _forget_others(self) -> None:
    """Snapshots that this run did not go on from, once it has a past of its own; until then another
    start, as on the mesh that they are of, can have them.
    """
    if self.snapshots and not self._forgotten:
      self.snapshots.keep(self._taken)
    self._forgotten = True

  def end(self) -> None:
    """Returns when the last checkpoint is written by all, and no snapshot is left."""
    self.checkpoints.wait()
    if self.snapshots:
      self.snapshots.clear()
