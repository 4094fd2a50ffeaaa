"""Snapshots of a run between its checkpoints, for which no disk is asked that hosts share.

  DIR/<step>.<process>/state/arrays      what the devices of that process hold, each shard once
  DIR/<step>.<process>/state/parts.json  which part of which array each of them is, in their order
  DIR/<step>.<process>/notes/notes.json  as a checkpoint's

DIR lies on a disk of every host's own, or in its memory. Both folders carry checksums of their
files (checked.py), and a snapshot gets its name only when all of it is written: neither a kill nor
a power cut leaves half of one that counts.

A shard is known by its place in the whole array, not by who wrote it: processes may change places
on a host, and one whose disk is lost is given its shards over the mesh by those that hold the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from gemjax.checkpoint.agreement import arrays_of_all, first_of_all, texts_of_all
from gemjax.checkpoint.checked import CorruptError, check_digest, write_digest
from gemjax.checkpoint.checkpoints import CheckpointError, Restored
from gemjax.checkpoint.parts import Part, copied, parts_of, read_parts, write_parts
from gemjax.checkpoint.replicas import given, givers
from gemjax.checkpoint.shards import placed, sharding_of

PARTIAL, REMOVED = ".partial", ".removed"  # At the end of the name of what does not count.
STATE, NOTES, JSON = "state", "notes", "notes.json"


class Snapshots:
  """Keeps two; while one is written, the one before it. All processes must call every method.

  Args:
    directory: Of this run, on this host.
    say: Is told in a sentence that this process could not write.

  Raises:
    CheckpointError: the directory cannot be made.
  """

  def __init__(self, directory: pathlib.Path, say: Callable[[str], None] = print):
    self._directory, self._say = pathlib.Path(directory).absolute(), say
    self._process = jax.process_index()
    host = socket.gethostname()
    self._here = {i for i, name in enumerate(texts_of_all(host)) if name == host}
    self._failed = False
    self._pool = ThreadPoolExecutor(1, "snapshot")
    self._writing: Future | None = None
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise CheckpointError(
        f"{self._directory} cannot be made ({error.strerror}); name another folder of this host"
      ) from error

  def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
    """Copies the arrays, then writes them while training goes on.

    A snapshot that cannot be written, as on a full disk, ends nothing: the run goes on without it
    and tries again with the next one.
    """
    self.wait()
    # What all processes have is not given up for what only some have: a disk may be slow, or full.
    newest = max((found for found, process in self._own() if process == self._process), default=-1)
    common = min(int(text) for text in texts_of_all(str(newest)))
    old = [folder for (found, _), folder in self._own().items() if found not in (newest, common)]
    self._writing = self._pool.submit(self._write, step, copied(state), notes, old)

  def wait(self) -> None:
    """Returns when the last snapshot of this process is written, or has failed."""
    if self._writing is not None:
      self._writing.result()

  def steps(self, after: int) -> list[int]:
    """Steps above `after` of which any process has a snapshot, the newest first."""
    own = sorted({step for step, _ in self._folders() if step > after}, reverse=True)
    texts = texts_of_all(" ".join(map(str, own[:50])))  # Of what fits a text.
    return sorted({int(step) for text in texts for step in text.split()}, reverse=True)

  def notes(self, step: int) -> dict[str, Any] | None:
    """The notes of a snapshot; None where no process has sound ones."""
    found = b""
    for folder in self._of(step):
      with contextlib.suppress(CorruptError, OSError):
        found = found or _notes(folder)
    found = first_of_all(found)
    return json.loads(found) if found else None

  def restore(self, like: Any, steps: Iterable[int]) -> tuple[Restored | None, list[str]]:
    """(the first of these `steps` of which every shard is found, if there is one; a sentence for
    each that was passed over).

    Args:
      like: Tree of arrays or `jax.ShapeDtypeStruct`.
      steps: Of snapshots.
    """
    passed: list[str] = []
    for step in steps:
      restored, lacking = self._read(step, like)
      if restored:
        return restored, passed
      passed.append(f"{lacking}: step {step:,} is passed over")
    return None, passed

  def keep(self, step: int | None) -> None:
    """Removes all snapshots on this host but those of the step, if any, that training goes on from:
    the others are of another past. Before `save` is called first.
    """
    whole = {folder for (found, _), folder in self._folders().items() if found == step}
    _remove(*(folder for folder in self._directory.iterdir() if folder not in whole))

  def clear(self) -> None:
    """Removes them: none is needed any more."""
    self.wait()
    _remove(*self._own().values())
    with contextlib.suppress(OSError):  # Another process of this host has some left.
      self._directory.rmdir()

  def close(self) -> None:
    """Waits for the last snapshot."""
    self._pool.shutdown()

  def _folders(self) -> dict[tuple[int, int], pathlib.Path]:
    """The complete snapshots on this host, by step and process."""
    found = {}
    for folder in self._directory.glob("*"):
      step, _, process = folder.name.partition(".")
      if step.isdigit() and process.isdigit():
        found[int(step), int(process)] = folder
    return found

  def _own(self) -> dict[tuple[int, int], pathlib.Path]:
    """Those of this process, and of what were processes of this host and are no more."""
    others = self._here - {self._process}
    return {key: folder for key, folder in self._folders().items() if key[1] not in others}

  def _of(self, step: int) -> list[pathlib.Path]:
    """Those of a step on this host, that of this process first."""
    found = {process: folder for (s, process), folder in self._folders().items() if s == step}
    return [found[process] for process in sorted(found, key=lambda p: (p != self._process, p))]

  def _write(self, step: int, parts: Any, notes: Any, old: list[pathlib.Path]) -> None:
    _remove(*old)
    folder = self._directory / f"{step:09d}.{self._process}"
    partial = folder.with_name(folder.name + PARTIAL)
    try:
      for item in (STATE, NOTES):
        (partial / item).mkdir(parents=True)
      write_parts(partial / STATE, parts)
      (partial / NOTES / JSON).write_text(json.dumps(notes))
      for item in (STATE, NOTES):
        write_digest(partial / item)
      _flush(partial, *partial.rglob("*"))
      partial.rename(folder)
      _flush(self._directory)
    except OSError as error:
      shutil.rmtree(partial, ignore_errors=True)
      if not self._failed:
        self._say(
          f"no snapshot of step {step:,} could be written to {self._directory} "
          f"({error.strerror}); training goes on without"
        )
      self._failed = True
    else:
      self._failed = False

  def _read(self, step: int, like: Any) -> tuple[Restored | None, str]:
    """(what was restored, if every shard is somewhere; why some process lacks its own).

    All agree on what each of them has before any array is sent.
    """
    leaves, tree = jax.tree.flatten(like)
    wanted = parts_of(like)
    lacking = {part for parts in wanted for part in parts.values()}
    found: dict[Part, np.ndarray] = {}
    notes, harm = b"", ""
    for folder in self._of(step):
      if not lacking:
        break
      try:
        notes = _notes(folder)
        found |= read_parts(folder / STATE, lacking)
      except (CorruptError, OSError) as error:
        harm = harm or str(error)
      lacking -= found.keys()
    if lacking and not harm:
      harm = f"process {self._process} has no snapshot"
      if notes:  # Of this host, but not all that it needs.
        harm = f"process {self._process} lacks shards, of another mesh or half written"
    said = next(filter(None, texts_of_all(harm)), "")
    here = sorted(wanted[0], key=lambda device: device.id)
    has = _of_all(leaves[0], [[parts[d] in found for parts in wanted] for d in here])
    sources = [givers(leaf, {d: row[i] for d, row in has.items()}) for i, leaf in enumerate(leaves)]
    if None in sources:
      return None, said
    arrays = []
    for i, (leaf, parts) in enumerate(zip(leaves, wanted, strict=True)):
      held = {part.index: found[part] for part in parts.values() if part in found}
      whole = all(row[i] for row in has.values())
      arrays.append(placed(leaf, held) if whole else given(leaf, held, sources[i]))
    passed = (f"{said}: step {step:,} is read from its replicas",) if said else ()
    notes = json.loads(first_of_all(notes))
    return Restored(step, jax.tree.unflatten(tree, arrays), notes, passed), said


def _notes(folder: pathlib.Path) -> bytes:
  check_digest(folder / NOTES)
  return (folder / NOTES / JSON).read_bytes()


def _remove(*folders: pathlib.Path) -> None:
  """A folder loses its name before its files: no half of one that counts is left."""
  for folder in folders:
    with contextlib.suppress(OSError):  # Another process of this host was faster.
      gone = folder.rename(folder.with_name(folder.name.removesuffix(REMOVED) + REMOVED))
      shutil.rmtree(gone, ignore_errors=True)


def _of_all(like: Any, rows: list[list[bool]]) -> dict[jax.Device, np.ndarray]:
  """The row of each device of the mesh, of which every process has those of its own."""
  devices = sorted(sharding_of(like).device_set, key=lambda d: (d.process_index, d.id))
  found = arrays_of_all(np.array(rows))
  return dict(zip(devices, found.reshape(-1, found.shape[-1]), strict=True))


def _flush(*paths: pathlib.Path) -> None:
  """Has the disk itself hold these files and folders: a host may lose its power."""
  for path in paths:
    descriptor = os.open(path, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
