"""The input pipeline on the Criteo schema, and beside it the training step that it feeds.

Both are medians over repeats that alternate within one run, each alone on the machine's cores.
"""

import itertools
import pathlib
import statistics
import tempfile
import time

import numpy as np
from tqdm import tqdm

from gemjax.config import Config, Embedding, Wukong
from gemjax.data.pipeline import train_batches
from gemjax.data.prepared import PreparedData, PreparedWriter
from gemjax.features import RESERVED, Batch, Dense, FeatureSet, Sparse
from gemjax.parallel.arrays import to_devices
from gemjax.train.programs import Programs
from gemjax.train.state import make_trainer

EXAMPLES, BATCH, REPEATS, STEPS = 2_000_000, 4096, 7, 2
ROWS = 1_000_000  # Of all tables together.


def run() -> dict[str, float]:
  """`pipeline_examples_per_second`, `step_examples_per_second`, and their ratio."""
  with tempfile.TemporaryDirectory() as folder:
    data = criteo_like(pathlib.Path(folder) / "criteo")
    batches = iter(train_batches(data, batch_size=BATCH, seed=0))
    step = wukong_step(data.features, next(batches))
    per_epoch = EXAMPLES // BATCH
    rates = {"pipeline": [], "step": []}
    for _ in tqdm(range(REPEATS), desc="measuring"):
      drain = lambda: [None for _ in itertools.islice(batches, per_epoch)]
      rates["pipeline"].append(per_epoch * BATCH / _seconds(drain))
      rates["step"].append(STEPS * BATCH / _seconds(step))
    batches.close()
  pipeline, step = (statistics.median(rates[k]) for k in ("pipeline", "step"))
  return {
    "pipeline_examples_per_second": pipeline,
    "step_examples_per_second": step,
    "pipeline_over_step": pipeline / step,
  }


def criteo_like(path: pathlib.Path, examples: int = EXAMPLES) -> PreparedData:
  """A prepared set with Criteo's 13 dense and 26 sparse features, filled at random."""
  rng = np.random.default_rng(0)
  sizes = np.geomspace(8, 1, 26)
  sizes = (RESERVED + 2 + ROWS * 0.9 * np.exp(-sizes) / np.exp(-sizes).sum()).astype(int)
  features = FeatureSet(
    dense=tuple(Dense(name=f"I{i}") for i in range(1, 14)),
    sparse=tuple(Sparse(name=f"C{i}", table=f"C{i}", size=int(s)) for i, s in enumerate(sizes, 1)),
  )
  with PreparedWriter(path) as writer:
    for start in tqdm(range(0, examples, 1 << 16), desc="writing"):
      n = min(1 << 16, examples - start)
      # Log-uniform ids: few are frequent, most are rare.
      ids = RESERVED - 1 + np.exp(rng.random((n, 26)) * np.log(sizes - RESERVED))
      dense = rng.standard_normal((n, 13), np.float32)
      label = (rng.random((n, 1)) < 0.25).astype(np.uint8)
      writer.add("train", {"dense": dense, "ids": ids.astype(np.int32), "label": label})
    return writer.finish(features, origin={"name": "benchmark"})


def wukong_step(features: FeatureSet, batch: Batch):
  """A function that trains STEPS steps of a compiled Wukong: d = 64, 3 layers, 40/40, k = 8."""
  config = Config(
    name="benchmark",
    embedding=Embedding(dim=64),
    model=Wukong(layers=3, fmb_units=40, lcb_units=40, rank=8, mlp=(512, 256), head=(512, 256)),
  )
  trainer = make_trainer(config, features, steps=1000)
  programs, state = Programs(trainer), trainer.born()
  batch = to_devices(trainer.mesh, batch)
  ahead = programs.ahead(state, batch)
  state, ahead, _ = programs.step(state, ahead, batch, batch)

  def steps():
    nonlocal state, ahead
    for _ in range(STEPS):
      state, ahead, report = programs.step(state, ahead, batch, batch)
    report.loss.block_until_ready()

  return steps


def _seconds(work) -> float:
  start = time.perf_counter()
  work()
  return time.perf_counter() - start
