"""Runs of the tiny config with few checkpoints and many snapshots, and what they leave."""

import json

import numpy as np
import pytest
import tensorstore as ts
import tiny

from gemjax import config as c
from gemjax.checkpoint.streamed import StoredArrays
from gemjax.train.feed import Feed
from gemjax.train.loop import train
from gemjax.train.recovery import Recovery
from gemjax.train.workdir import CHECKPOINTS, SUMMARY, saved_steps

EVERY = 2


def few_checkpoints(data, compiled, local, mesh=(1, 1)) -> c.Config:
  """And many snapshots."""
  config = tiny.get_config("logistic")
  config.data.path, config.compilation.cache = str(data), str(compiled)
  config.train.eval_every, config.mesh = 1.0, c.Mesh(data=mesh[0], model=mesh[1])
  # Tables are split, and rows of a batch already looked up when the one before it is saved.
  config.embedding.replicated_rows, config.embedding.lookup = 0, "ahead"
  config.checkpoint = c.Checkpoint(local=str(local), local_every=EVERY)
  return config


def snapshots(local) -> dict[int, set[int]]:
  """Step -> processes with a complete snapshot of it."""
  found: dict[int, set[int]] = {}
  for folder in local.glob("*/*"):
    step, _, process = folder.name.partition(".")
    if process.isdigit():
      found.setdefault(int(step), set()).add(int(process))
  return found


def arrays(workdir, step: int) -> dict[str, np.ndarray]:
  """Every array of a checkpoint by its path, whatever mesh wrote it."""
  base = f"file://{workdir / CHECKPOINTS / f'{step:09d}' / 'state'}/"
  keys = ts.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
  names = [key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")]
  stored = StoredArrays(workdir / CHECKPOINTS, step)
  return {name: stored.read(name) for name in names}


def assert_same_end(workdir, unbroken) -> None:
  found, wanted = (json.loads((w / SUMMARY).read_text()) for w in (workdir, unbroken))
  for summary in (found, wanted):
    del summary["start_up_seconds"], summary["train"]["seconds"]
    del summary["train"]["examples_per_second"]
  assert found == wanted, [(k, found[k], wanted[k]) for k in wanted if found[k] != wanted[k]]
  last = saved_steps(workdir)[-1]
  assert saved_steps(unbroken)[-1] == last
  found, wanted = arrays(workdir, last), arrays(unbroken, last)
  assert found.keys() == wanted.keys() and len(found) > 20
  assert [n for n in wanted if found[n].tobytes() != wanted[n].tobytes()] == []


class Broken(Exception):
  pass


def broken(monkeypatch, config, workdir, behind: int) -> None:
  """A start that fails with an error behind its `behind`-th step. It waits for checkpoints: until
  one is written there are no snapshots.
  """
  advance, save, asked = Feed.advance, Recovery.save, iter(range(1000))

  def fails(self):
    if next(asked) == behind:
      raise Broken
    return advance(self)

  def waits(self, *args, **kwargs):
    save(self, *args, **kwargs)
    self.checkpoints.wait()

  with monkeypatch.context() as patch, pytest.raises(Broken):
    patch.setattr(Feed, "advance", fails)
    patch.setattr(Recovery, "save", waits)
    train(config, workdir)
