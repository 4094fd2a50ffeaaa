"""What longer histories cost a step of GEM and what they tell it, and the price of empty slots.

The model is that of configs/gem_movielens.py; for times every example has the same number of
events, in batches of one size and the room that the pipeline gives them. Attention among events
sees blocks of 256; over the whole history it sees one summary of eight events each. Times are
medians of steps in turns. Padding is measured twice: "ragged" histories of 0 to 1,000 events, as
many in all as 500 each, half of which a batch padded to its longest would waste; and "empty", a
batch with as many empty slots as events, which the pipeline never makes.

NE is that of `launch/train.py --config=configs/gem_movielens.py --config.data.history=EVENTS` on
ML-1M, seed 0, where GEMJAX_DATA is a folder that holds ml-1m; finished runs in GEMJAX_RUNS (default
runs/history) of the same config are not repeated. Where matplotlib is installed, both are drawn
there: history.png.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import runpy

import numpy as np
from benchmarks import movielens
from benchmarks.turns import jitted_step, stepper, take_turns

from gemjax.features import (
  HISTORY_STEPS,
  Batch,
  EventColumn,
  Events,
  FeatureSet,
  History,
  Sparse,
  event_capacity,
)
from gemjax.train.state import make_trainer

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "gem_movielens.py"
RUNS = pathlib.Path(os.environ.get("GEMJAX_RUNS", "runs/history"))
BATCH, USERS = 32, 3_000
COLUMNS = {"item": 3_000, "rating": 7, "genre": 20}  # Of an event, as MovieLens has them.
LENGTHS = (10, 50, 100, 500, 2000)
PADDED = 500  # Events an example, where padding is measured.
REPEATS = 7


def run() -> dict[str, float]:
  """Seconds a step by events an example, the growth beside theirs, and the price of padding."""
  steps = {f"{length}": _step(length, np.full(BATCH, length)) for length in LENGTHS}
  ragged_B = np.linspace(0, 2 * PADDED, BATCH).round().astype(int)
  steps["ragged"] = _step(2 * PADDED, ragged_B)
  steps["empty"] = _step(PADDED, np.full(BATCH, PADDED), slots=2 * BATCH * PADDED)
  seconds = take_turns(steps, "lengths", REPEATS)
  figures = {f"step_seconds_{name}_events": seconds[name] for name in map(str, LENGTHS)}
  told = _told()
  if told and importlib.util.find_spec("matplotlib"):
    _draw([seconds[str(length)] for length in LENGTHS], [told[length] for length in LENGTHS])
  figures |= {f"test_ne_{length}_events": ne for length, ne in told.items()}
  longest, before = LENGTHS[-1], LENGTHS[-2]
  growth = seconds[f"{longest}"] / seconds[f"{before}"]
  return figures | {
    f"time_over_events_{before}_to_{longest}": growth / (longest / before),
    **{f"{kind}_over_none": seconds[kind] / seconds[f"{PADDED}"] for kind in ("ragged", "empty")},
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

  _, (above, below) = pyplot.subplots(2, sharex=True, layout="constrained")
  above.plot(LENGTHS, ne, "o-")
  above.set(ylabel="test NE, ML-1M, one seed", xscale="log")
  below.plot(LENGTHS, seconds, "o-")
  below.set(ylabel=f"seconds a step of {BATCH}", xlabel="events an example", yscale="log")
  pyplot.savefig(RUNS / "history.png", dpi=150)


def _step(longest: int, length_B: np.ndarray, *, slots: int = 0):
  """A step of examples with so many events, by default in the room that the pipeline gives."""
  config = runpy.run_path(str(CONFIG))["get_config"]()
  config.data.batch_size, config.data.history = BATCH, longest
  features = _features(longest)
  trainer = make_trainer(config, features, steps=1000)
  slots = slots or event_capacity(int(length_B.sum()), steps=HISTORY_STEPS)
  return stepper(jitted_step(trainer), trainer.born(), _batch(features, length_B, slots))[0]


def _features(length: int) -> FeatureSet:
  columns = [EventColumn(name=n, size=size, table=n) for n, size in COLUMNS.items()]
  return FeatureSet(
    sparse=(
      Sparse(name="user", size=USERS, table="user"),
      Sparse(name="item", size=COLUMNS["item"], table="item"),
    ),
    history=(History(name="rated", columns=tuple(columns), max_length=length),),
  )


def _batch(features: FeatureSet, length_B: np.ndarray, slots: int) -> Batch:
  rng = np.random.default_rng(0)
  used, sizes = length_B.sum(), list(COLUMNS.values())
  ids_EC, age_E = np.zeros((slots, len(sizes)), np.int32), np.zeros(slots, np.int32)
  ids_EC[:used] = rng.integers(2, sizes, (used, len(sizes)))
  ages = [np.sort(rng.integers(1, 10**6, length))[::-1] for length in length_B]
  age_E[:used] = np.concatenate(ages)
  return Batch(
    dense_BF=np.zeros((BATCH, 0), np.float32),
    ids_BS=rng.integers(2, 3_000, (BATCH, len(features.sparse))).astype(np.int32),
    label_BT=(rng.random((BATCH, 1)) < 0.5).astype(np.float32),
    weight_B=np.ones(BATCH, np.float32),
    group_B=np.full(BATCH, -1, np.int32),
    oracle_BT=np.zeros((BATCH, 0), np.float32),
    sequences={},
    histories={"rated": Events(ids_EC, age_E, length_B.astype(np.int32))},
  )
