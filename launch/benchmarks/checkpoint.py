"""Saving and restoring a training state, beside plain files of the same bytes.

Both use the same disk in turns: written until the disk has it all, read when memory has none of it.
A restore comes once in a process, at its start: restoring and reading have a new one each, whose
memory is untouched. `again` are both in the process that trains, whose memory has been in use, so
that reading a file costs hardly more than one copy. Snapshots are written to the same disk. Figures
are medians.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import statistics
import tempfile
import time

import jax
import numpy as np
from benchmarks.data import criteo_like
from benchmarks.own_process import OwnProcess
from tqdm import tqdm

from gemjax.checkpoint import Checkpoints, Snapshots
from gemjax.config import Config, Embedding, Wukong
from gemjax.data.pipeline import train_batches
from gemjax.data.prepared import open_prepared
from gemjax.parallel.arrays import to_devices
from gemjax.train.programs import Programs
from gemjax.train.state import make_trainer

BATCH, REPEATS, CHUNK = 4096, 7, 1 << 24
CONFIG = Config(name="benchmark", embedding=Embedding(dim=64), model=Wukong())


class _Reader:
  """What a process of its own does: restore, or read a plain file."""

  def __init__(self, data: pathlib.Path, checkpoints: pathlib.Path, snapshots: pathlib.Path):
    trainer = make_trainer(CONFIG, open_prepared(data).features, steps=1000)
    self._checkpoints, self._like = Checkpoints(checkpoints, read_only=True), trainer.abstract()
    self._snapshots = Snapshots(snapshots)

  def ready(self) -> None:
    """Returns when all of it is imported."""

  def restore(self) -> None:
    jax.block_until_ready(self._checkpoints.restore(self._like).state)

  def restore_snapshot(self) -> None:
    steps = self._snapshots.steps(after=-1)
    jax.block_until_ready(self._snapshots.restore(self._like, steps)[0].state)

  def read(self, file: pathlib.Path) -> None:
    _read(file)


def run() -> dict[str, float]:
  """Ratios of bandwidth, above 1 where the checkpoint is the faster, and the time that training
  stands still for a save or a snapshot, in steps.
  """
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    data = criteo_like(folder / "criteo", examples=4 * BATCH)
    trainer = make_trainer(CONFIG, data.features, steps=1000)
    programs, state = Programs(trainer), trainer.born()
    batch = to_devices(trainer.mesh, next(iter(train_batches(data, batch_size=BATCH, seed=0))))
    ahead = programs.ahead(state, batch)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    blob = np.random.default_rng(0).bytes(size)  # As hard to compress as weights.
    names = ["step", "block", "save", "snapshot_block", "snapshot", "write"]
    names += ["restore", "restore_snapshot", "read", "restore_again", "read_again"]
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def timed(what: str, start: float) -> None:
      seconds[what].append(time.perf_counter() - start)

    for i in tqdm(range(REPEATS), desc="measuring"):
      start = time.perf_counter()
      state, ahead, _ = programs.step(state, ahead, batch, batch)
      jax.block_until_ready(state)
      timed("step", start)
      checkpoints = Checkpoints(folder / f"save{i}")
      start = time.perf_counter()
      checkpoints.save(i, state, {}, best=None)
      timed("block", start)
      checkpoints.wait()
      os.sync()
      timed("save", start)
      snapshots = Snapshots(folder / f"local{i}")
      start = time.perf_counter()
      snapshots.save(i, state, {})
      timed("snapshot_block", start)
      snapshots.wait()
      os.sync()
      timed("snapshot", start)
      start = time.perf_counter()
      (folder / "plain").write_bytes(blob)
      os.sync()
      timed("write", start)
      for what, given in (
        ("restore", ()), ("restore_snapshot", ()), ("read", (folder / "plain",)),
      ):  # fmt: skip
        stored = (folder / f"save{i}", folder / f"local{i}")
        process = OwnProcess(_Reader, folder / "criteo", *stored, tuned=True)
        process.call("ready")
        _forget(folder)
        seconds[what].append(process.call(what, *given)[1])
        process.close()
      _forget(folder)
      start = time.perf_counter()
      restored = checkpoints.restore(trainer.abstract())
      jax.block_until_ready(restored.state)
      timed("restore_again", start)
      start = time.perf_counter()
      _read(folder / "plain")
      timed("read_again", start)
      del restored
      checkpoints.close()
      snapshots.close()
      snapshots.clear()
      shutil.rmtree(folder / f"save{i}")
      (folder / "plain").unlink()
  median = {what: statistics.median(s[1:]) for what, s in seconds.items()}  # The first compiles.
  return {
    "state_bytes": float(size),
    **{f"{what}_seconds": s for what, s in median.items()},
    "restore_over_file_io": median["read"] / median["restore"],
    "restore_again_over_file_io": median["read_again"] / median["restore_again"],
    "save_over_file_io": median["write"] / median["save"],
    "save_blocks_steps": median["block"] / median["step"],
    "snapshot_over_file_io": median["write"] / median["snapshot"],
    "snapshot_restore_over_file_io": median["read"] / median["restore_snapshot"],
    "snapshot_blocks_steps": median["snapshot_block"] / median["step"],
  }


def _forget(folder: pathlib.Path) -> None:
  """Drops what the operating system holds of the files, which are on disk."""
  for file in (f for f in folder.rglob("*") if f.is_file()):
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _read(file: pathlib.Path) -> None:
  """Into memory, as a restore must."""
  whole = memoryview(bytearray(file.stat().st_size))
  with file.open("rb", buffering=0) as stream:
    at = 0
    while n := stream.readinto(whole[at : at + CHUNK]):
      at += n
