"""What longer histories cost a step of GEM and what they tell it, and the price of empty slots.

The model is that of configs/gem_movielens.py; for times every example has the same number of
events, in batches of one size. Attention among the newest events sees blocks of 64; over the whole
history it sees one summary of eight events each. Times are medians of steps in turns.

NE is that of `launch/train.py --config=configs/gem_movielens.py --config.data.history=EVENTS` on
ML-1M, seed 0, where GEMJAX_DATA is a folder that holds ml-1m; finished runs in GEMJAX_RUNS (default
runs/history) are not repeated. Where matplotlib is installed, both are drawn there: history.png.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import runpy

import numpy as np
from benchmarks import movielens
from benchmarks.turns import jitted_step, stepper, take_turns

from gemjax.features import Batch, EventColumn, Events, FeatureSet, History, Sparse
from gemjax.train.state import make_trainer

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "gem_movielens.py"
RUNS = pathlib.Path(os.environ.get("GEMJAX_RUNS", "runs/history"))
BATCH, USERS, ITEMS = 32, 3_000, 3_000
LENGTHS = (10, 50, 100, 500, 2000)
PADDED = 500  # Events an example, of which the padded batch has as many slots again.
REPEATS = 7


def run() -> dict[str, float]:
  """Seconds a step by events an example, the growth beside theirs, and the price of padding."""
  steps = {f"{length}": _step(length, 1) for length in LENGTHS}
  steps["padded"] = _step(PADDED, 2)
  seconds = take_turns(steps, "lengths", REPEATS)
  figures = {f"step_seconds_{name}_events": seconds[name] for name in map(str, LENGTHS)}
  told = _told()
  if told and importlib.util.find_spec("matplotlib"):
    _draw([seconds[str(length)] for length in LENGTHS], [told[length] for length in LENGTHS])
  figures |= {f"test_ne_{length}_events": ne for length, ne in told.items()}
  longest, before = LENGTHS[-1], LENGTHS[-2]
  growth = seconds[f"{longest}"] / seconds[f"{before}"]
  return figures | {
    f"step_seconds_{PADDED}_events_half_padding": seconds["padded"],
    f"time_over_events_{before}_to_{longest}": growth / (longest / before),
    "half_padding_over_none": seconds["padded"] / seconds[f"{PADDED}"],
  }


def _told() -> dict[int, float]:
  """Events -> test NE of a run that sees the last so many; nothing without the data."""
  raw = pathlib.Path(os.environ.get("GEMJAX_DATA", "data")) / "ml-1m"
  if not raw.exists():
    print(f"no {raw}: set GEMJAX_DATA to measure NE", flush=True)
    return {}
  data = movielens.prepared_data("ml-1m", raw, RUNS / "ml-1m-data")
  ne = {}
  for length in LENGTHS:
    flag = f"--config.data.history={length}"
    summary = movielens.trained("gem", 0, data, RUNS / f"gem-{movielens.digest('gem', flag)}", flag)
    ne[length] = summary["test"]["ne"]
  return ne


def _draw(seconds: list[float], ne: list[float]) -> None:
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  _, (above, below) = pyplot.subplots(2, sharex=True)
  above.plot(LENGTHS, ne, "o-")
  above.set(ylabel="test NE, ML-1M, one seed", xscale="log")
  below.plot(LENGTHS, seconds, "o-")
  below.set(ylabel=f"seconds a step of {BATCH}", xlabel="events an example", yscale="log")
  pyplot.savefig(RUNS / "history.png", dpi=150)


def _step(length: int, slots: int):
  """A step of examples with `length` events each, in `slots` times as much room."""
  config = runpy.run_path(str(CONFIG))["get_config"]()
  config.data.batch_size, config.data.history = BATCH, length
  features = _features(length)
  trainer = make_trainer(config, features, steps=1000)
  return stepper(jitted_step(trainer), trainer.born(), _batch(features, length, slots))[0]


def _features(length: int) -> FeatureSet:
  item = EventColumn(name="item", size=ITEMS, table="item")
  return FeatureSet(
    sparse=(
      Sparse(name="user", size=USERS, table="user"),
      Sparse(name="item", size=ITEMS, table="item"),
    ),
    history=(History(name="rated", columns=(item,), max_length=length),),
  )


def _batch(features: FeatureSet, length: int, slots: int) -> Batch:
  rng = np.random.default_rng(0)
  ids = lambda *shape: rng.integers(2, ITEMS, shape).astype(np.int32)
  used = BATCH * length
  ids_EC, age_E = np.zeros((slots * used, 1), np.int32), np.zeros(slots * used, np.int32)
  ids_EC[:used] = ids(used, 1)
  age_E[:used] = np.sort(rng.integers(1, 10**6, (BATCH, length)), 1)[:, ::-1].reshape(-1)
  return Batch(
    dense_BF=np.zeros((BATCH, 0), np.float32),
    ids_BS=ids(BATCH, len(features.sparse)),
    label_BT=(rng.random((BATCH, 1)) < 0.5).astype(np.float32),
    weight_B=np.ones(BATCH, np.float32),
    group_B=np.full(BATCH, -1, np.int32),
    oracle_BT=np.zeros((BATCH, 0), np.float32),
    sequences={},
    histories={"rated": Events(ids_EC, age_E, np.full(BATCH, length, np.int32))},
  )
