"""The input pipeline on the Criteo schema, beside it the training step that it feeds, and the
pipeline of histories: the demo's two, dealt by cost.

All are medians over repeats that alternate within one run, each alone on the machine's cores.
"""

import functools
import itertools
import pathlib
import runpy
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
from gemjax.train.cost import example_cost
from gemjax.train.programs import Programs
from gemjax.train.source import open_data
from gemjax.train.state import make_trainer

EXAMPLES, BATCH, REPEATS, STEPS = 2_000_000, 4096, 7, 2
ROWS = 1_000_000  # Of all tables together.
DEMO = pathlib.Path(__file__).parents[2] / "configs" / "wukong_demo.py"
DEMO_EXAMPLES = 400_000


def run() -> dict[str, float]:
  """Examples a second of the three, and what the pipeline has beside the step."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    criteo = criteo_like(folder / "criteo")
    batches = iter(train_batches(criteo, batch_size=BATCH, seed=0))
    dealt = iter(demo_batches(folder / "demo"))
    step = wukong_step(criteo.features, next(batches))
    rates = {"pipeline": [], "step": [], "histories": []}
    for _ in tqdm(range(REPEATS), desc="measuring"):
      rates["pipeline"].append(_read(batches, EXAMPLES))
      rates["step"].append(STEPS * BATCH / _seconds(step))
      rates["histories"].append(_read(dealt, DEMO_EXAMPLES))
    batches.close()
    dealt.close()
  median = {kind: statistics.median(of) for kind, of in rates.items()}
  return {
    **{f"{kind}_examples_per_second": rate for kind, rate in median.items()},
    "pipeline_over_step": median["pipeline"] / median["step"],
  }


def demo_batches(folder: pathlib.Path):
  """Batches of the demo, whose examples have two histories."""
  config = runpy.run_path(str(DEMO))["get_config"]()
  config.data.demo_examples = DEMO_EXAMPLES
  folder.mkdir()
  return train_batches(
    open_data(config, folder),
    batch_size=config.data.batch_size,
    seed=0,
    history_length=config.data.history,
    cost=functools.partial(example_cost, config),
  )


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


def _read(batches, examples: int) -> float:
  """Examples a second of about so many."""
  size = len(next(batches).weight_B)
  count = examples // size
  return count * size / _seconds(lambda: [None for _ in itertools.islice(batches, count)])


def _seconds(work) -> float:
  start = time.perf_counter()
  work()
  return time.perf_counter() - start
