"""A process that restores, checks and saves without end, for a test that kills it."""

import os
import pathlib

import jax
import numpy as np
from absl import logging

from gemjax.checkpoint import Checkpoints


def tree(step: int) -> dict[str, np.ndarray]:
  """What the checkpoint of a step must hold, to the bit: arrays of many sizes, 5 MB in all."""
  rng = np.random.default_rng(step)
  sizes = {f"small{i}": (i + 1, 16) for i in range(20)} | {"large": (20_000, 64)}
  return {name: rng.random(shape, np.float32) for name, shape in sizes.items()} | {
    "step": np.int32(step)
  }


def wrong(state, step: int) -> list[str]:
  """Names of the arrays that differ from those of the step."""
  wanted = tree(step)
  return [n for n in wanted if np.asarray(state[n]).tobytes() != wanted[n].tobytes()]


def like():
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(abstract, tree(0))


def work(folder: pathlib.Path, diary: pathlib.Path) -> None:
  """Never ends by itself, but on an error; every line of the diary was true when it was written."""
  logging.set_verbosity(logging.FATAL)
  with diary.open("a", buffering=1) as lines:
    like()  # Starts JAX.
    print("restoring", file=lines)
    checkpoints, step = Checkpoints(folder, keep=2), 0
    if checkpoints.steps:
      restored = checkpoints.restore(like())
      step = restored.step
      bad = wrong(restored.state, step), restored.notes != {"step": step}, restored.passed
      print("WRONG" if any(bad) else "restored", step, *bad, file=lines)
    while True:
      step += 1
      state = jax.device_put(tree(step))
      print("saving", step, file=lines)
      checkpoints.save(step, state, {"step": step}, best=None)
      checkpoints.wait()
      print("saved", step, file=lines)


def quiet_work(folder: pathlib.Path, diary: pathlib.Path) -> None:
  """`work`, whose errors go into the diary."""
  try:
    work(folder, diary)
  except BaseException as error:
    with diary.open("a") as lines:
      print("WRONG", os.getpid(), repr(error), file=lines)
    raise
