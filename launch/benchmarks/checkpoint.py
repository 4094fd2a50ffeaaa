"""Saving and restoring a training state, beside plain files of the same bytes.

Both use the same disk in turns: written until the disk has it all, read when memory has none of it.
Figures are medians.
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
from tqdm import tqdm

from gemjax.checkpoint import Checkpoints
from gemjax.config import Config, Embedding, Wukong
from gemjax.data.pipeline import train_batches
from gemjax.parallel.arrays import to_devices
from gemjax.train.programs import Programs
from gemjax.train.state import make_trainer

BATCH, REPEATS, CHUNK = 4096, 7, 1 << 24


def run() -> dict[str, float]:
  """Ratios of bandwidth, above 1 where the checkpoint is the faster, and the time that training
  stands still for a save, in steps.
  """
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    data = criteo_like(folder / "criteo", examples=4 * BATCH)
    config = Config(name="benchmark", embedding=Embedding(dim=64), model=Wukong())
    trainer = make_trainer(config, data.features, steps=1000)
    programs, state = Programs(trainer), trainer.born()
    batch = to_devices(trainer.mesh, next(iter(train_batches(data, batch_size=BATCH, seed=0))))
    ahead = programs.ahead(state, batch)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    blob = np.random.default_rng(0).bytes(size)  # As hard to compress as weights.
    seconds = {"step": [], "block": [], "save": [], "write": [], "restore": [], "read": []}

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
      start = time.perf_counter()
      (folder / "plain").write_bytes(blob)
      os.sync()
      timed("write", start)
      _forget(folder)
      start = time.perf_counter()
      restored = checkpoints.restore(trainer.abstract())
      jax.block_until_ready(restored.state)
      timed("restore", start)
      start = time.perf_counter()
      _read(folder / "plain")
      timed("read", start)
      del restored
      checkpoints.close()
      shutil.rmtree(folder / f"save{i}")
      (folder / "plain").unlink()
  median = {what: statistics.median(s[1:]) for what, s in seconds.items()}  # The first compiles.
  return {
    "state_bytes": float(size),
    **{f"{what}_seconds": s for what, s in median.items()},
    "restore_over_file_io": median["read"] / median["restore"],
    "save_over_file_io": median["write"] / median["save"],
    "save_blocks_steps": median["block"] / median["step"],
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
