"""What longer histories cost a step of GEM and what they tell it, and the price of empty slots.

The model is that of configs/gem_movielens.py; for times every example has the same number of
events, in batches of one size and with no empty slot. Attention among events sees blocks of 256;
over the whole history it sees one summary of eight events each. Times are medians in turns.

Padding is measured against the batch of 500 events each. "ragged" are histories of 0 to 1,000
events, as many in all, half of which a batch padded to its longest would waste, dealt and given
slots as by the pipeline. "half_full" is that batch of 500 events each in a run whose fullest batch
has twice as many, in the slots that the pipeline then gives it; "seventh_empty" has as many empty
ones as the pipeline leaves its fullest device at most (gemjax/data/rooms.py). "forced" is what the
step takes with as many empty slots as events, as a device of few short ones may have.

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

from gemjax.data.balance import halves
from gemjax.data.batches import MARGIN
from gemjax.data.rooms import RATIO, Rooms
from gemjax.features import Batch, EventColumn, Events, FeatureSet, History, Sparse
from gemjax.train.cost import example_cost
from gemjax.train.state import make_trainer

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "gem_movielens.py"
RUNS = pathlib.Path(os.environ.get("GEMJAX_RUNS", "runs/history"))
BATCH, USERS = 32, 3_000
COLUMNS = {"item": 3_000, "rating": 7, "genre": 20}  # Of an event, as MovieLens has them.
LENGTHS = (10, 50, 100, 500, 2000)
PADDED = 500  # Events an example, where padding is measured.
REPEATS = 21


def run() -> dict[str, float]:
  """Seconds a step by events an example, the growth beside theirs, and the price of padding."""
  steps = {f"{length}": _step(length, np.full(BATCH, length)) for length in LENGTHS}
  steps |= {kind: _step(*of) for kind, of in _padded().items()}
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
    **{f"{kind}_over_none": seconds[kind] / seconds[f"{PADDED}"] for kind in _padded()},
  }


def _padded() -> dict[str, tuple[int, np.ndarray, int]]:
  """Kind -> (longest history, events of each example, slots)."""
  even_B, events = np.full(BATCH, PADDED), BATCH * PADDED
  ragged_B = np.linspace(0, 2 * PADDED, BATCH).round().astype(int)
  ragged_B = ragged_B[halves(example_cost(_config(2 * PADDED), {"rated": ragged_B})[None])]

  def slots(fullest):
    """Of a batch of `events` in a run whose fullest has so many."""
    rooms = Rooms.measured([{"rated": fullest}], {"rated": 4 * events}, MARGIN)
    return rooms.of({"rated": events})["rated"]

  return {
    "ragged": (2 * PADDED, ragged_B, slots(events)),
    "half_full": (PADDED, even_B, slots(2 * events)),
    "seventh_empty": (PADDED, even_B, int(events / RATIO)),
    "forced": (PADDED, even_B, 2 * events),
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


def _step(longest: int, length_B: np.ndarray, slots: int = 0):
  """A step of examples with so many events, by default without an empty slot."""
  features = _features(longest)
  trainer = make_trainer(_config(longest), features, steps=1000)
  batch = _batch(features, length_B, slots or int(length_B.sum()))
  return stepper(jitted_step(trainer), trainer.born(), batch)[0]


def _config(longest: int):
  config = runpy.run_path(str(CONFIG))["get_config"]()
  config.data.batch_size, config.data.history = BATCH, longest
  return config


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
