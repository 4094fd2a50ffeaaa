"""What sharded tables move between devices, against the least that could be moved.

Virtual CPU devices run the program of a mesh; only plans are computed, as nothing here depends on
the values of rows. The least is to give every device each remote row that it wants, once, and to
send one gradient back: different remote rows x width x 2 x 4 bytes, which NumPy counts from ids and
layout.

Letters: B examples, D devices of `data`, L of `model`, T = D L of both, M look-ups of a device.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from gemjax.config import Config, Embedding, Fm
from gemjax.embedding import ShardedTables, TableLayout
from gemjax.embedding.tables import StackLayout
from gemjax.features import Batch, FeatureSet, Jagged, Sequence, Sparse, event_capacity
from gemjax.parallel.arrays import BATCH, to_devices
from gemjax.parallel.mesh import make_mesh
from gemjax.plan.collectives import collectives
from gemjax.train.programs import measured
from gemjax.train.state import Trainer, make_trainer
from gemjax.train.step import plan_step, train_step

# Name in the figures -> (data, model): devices of `model` alone, or data x model.
MESHES = {"1": (1, 1), "2": (1, 2), "4": (1, 4), "8": (1, 8), "4x2": (4, 2), "2x4": (2, 4)}
KINDS = ("uniform", "zipf")
EXAMPLES, BATCHES = 4096, 20  # Of a device; of a mesh and kind, beside the measured one.
DIM = 64
SIZES = np.geomspace(4, 1_000_000, 39).astype(int)  # Of the tables: 3.6 million rows.
LONGEST, MEAN_EVENTS = 50, 20  # Of the sequence feature, which shares the largest table.
BYTES = 4  # Of a number of a row, and of an id.

Bytes = Counter[tuple[str, str]]  # (collective, what) -> bytes that all devices receive from others


def run() -> dict[str, Any]:
  """Figure -> mesh -> kind of ids -> value; None where devices exchange nothing.

  bytes_over_minimum             rows and gradients exchanged inside `model`, empty slots and all
                                 rounds included, over the least
  rounds                         of a batch, mean and max; 0 where nothing is exchanged
  padding_share                  slots of the exchanged buffers, own ones included, without a row
  event_padding_share            slots for events without an event
  id_bytes_over_minimum          ids exchanged inside `model`, over the same least
  replicated_bytes_over_minimum  gradients and ids of replicated tables, gathered from all devices
  data_bytes_over_minimum        gradients and ids gathered among the groups of `data`
  all_bytes_over_minimum         the four of them together
  minimum_megabytes              the least, a step and device
  unique_over_lookups            different rows among a device's look-ups of stacks split by row
  largest_over_mean_bucket       rows that a device wants of an owner; mean over batches
  program_over_counted           bytes of the compiled step's collectives over those counted
  """
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", max(d * m for d, m in MESHES.values()))
  config = Config(name="benchmark", embedding=Embedding(dim=DIM), model=Fm())
  rows = [(name, *mesh, kind) for name, mesh in MESHES.items() for kind in KINDS]
  figures: dict[str, Any] = {}
  for name, data, model, kind in tqdm(rows, desc="meshes and kinds of ids"):
    batches = (draw_batch(kind, t, data * model) for t in range(BATCHES + 1))
    for figure, value in measure(config, features(), data, model, batches).items():
      figures.setdefault(figure, {}).setdefault(name, {})[kind] = value
  return figures


def measure(
  config: Config, features: FeatureSet, data: int, model: int, batches: Iterator[Batch]
) -> dict[str, Any]:
  """The figures of one mesh; the first batch gives the capacity and is not counted.

  The tables must be float32.
  """
  mesh = make_mesh(data, model, jax.devices()[: data * model])
  batch = next(batches)
  trainer = measured(make_trainer(config, features, 1, mesh), to_devices(mesh, batch))
  tables, stacks = trainer.tables, exchanged(trainer.tables)
  in_program = sum(program_bytes(trainer, batch)[False].values())
  counted = sum(count_bytes(tables, batch, dict.fromkeys(trainer.tables.capacity, 1)).values())
  take = jax.jit(lambda b: {s.name: plan_step(trainer, b).plans[s.name].rounds_1 for s in stacks})

  moved, rounds, skew, total = Bytes(), [], [], Counter()
  for batch in batches:
    taken = {n: int(r[0]) for n, r in jax.device_get(take(to_devices(mesh, batch))).items()}
    moved += count_bytes(tables, batch, taken)
    rounds.append(max(taken.values(), default=0))
    wanted = wanted_rows(tables.layout, batch, data, model)
    for s in stacks:
      remote = wanted[s.name].rows_TL[~own_share(data, model)].sum()
      total["least"] += int(remote) * s.width * 2 * BYTES
      total["slots"] += data * model**2 * tables.capacity[s.name] * taken[s.name]
    total["rows"] += sum(int(w.rows_TL.sum()) for w in wanted.values())
    total["lookups"] += sum(w.lookups for w in wanted.values())
    skew.append(max((w.rows_TL.max() / w.rows_TL.mean() for w in wanted.values()), default=1.0))
    for jagged in batch.sequences.values():
      total["events"] += int(jagged.lengths_B.sum())
      total["event slots"] += len(jagged.values_E)

  over_least = lambda *what: _ratio(sum(moved[w] for w in what), total["least"])
  return {
    "bytes_over_minimum": over_least(("all-to-all", "rows")),
    "rounds": {"mean": float(np.mean(rounds)), "max": max(rounds)},
    "padding_share": _rest(total["rows"], total["slots"]),
    "event_padding_share": _rest(total["events"], total["event slots"]),
    "id_bytes_over_minimum": over_least(("all-to-all", "ids")),
    "replicated_bytes_over_minimum": over_least(("all-gather", "replicated")),
    "data_bytes_over_minimum": over_least(("all-gather", "data")),
    "all_bytes_over_minimum": over_least(*moved),
    "minimum_megabytes": total["least"] / len(rounds) / (data * model) / 1e6,
    "unique_over_lookups": _ratio(total["rows"], total["lookups"]),
    "largest_over_mean_bucket": float(np.mean(skew)),
    "program_over_counted": _ratio(in_program, counted),
  }


class Wanted(NamedTuple):
  """What the devices want of one stack."""

  rows_TL: np.ndarray  # Different rows that device t wants of owner l of its group.
  lookups: int  # Of all devices, duplicates counted.


def wanted_rows(layout: TableLayout, batch: Batch, data: int, model: int) -> dict[str, Wanted]:
  """Row stack -> what is wanted of it; from the host's ids alone, by NumPy alone."""
  out, devices = {}, data * model
  examples = len(batch.weight_B) // devices
  for stack in (s for s in layout.stacks if s.placement == "row"):
    rows_TL, lookups = np.zeros((devices, model), int), 0
    for t in range(devices):
      mine = slice(t * examples, (t + 1) * examples)
      ids = [(p, batch.ids_BS[mine, p.column]) for p in layout.sparse if p.stack == stack.name]
      for p in (p for p in layout.sequence if p.stack == stack.name):
        values_E, lengths_B = batch.sequences[p.feature]
        start = t * (len(values_E) // devices)
        ids.append((p, values_E[start : start + lengths_B[mine].sum()]))
      row_M = np.concatenate([i.astype(np.uint64) + np.uint64(p.offset) for p, i in ids])
      wanted_R = np.zeros(stack.rows, bool)
      wanted_R[row_M * np.uint64(stack.multiplier) % np.uint64(stack.rows)] = True
      rows_TL[t] = wanted_R.reshape(model, -1).sum(1)  # An owner's share is contiguous.
      lookups += len(row_M)
    out[stack.name] = Wanted(rows_TL, lookups)
  return out


def own_share(data: int, model: int) -> np.ndarray:
  """(T, L) bool: where the owner is the device itself."""
  return np.tile(np.eye(model, dtype=bool), (data, 1))


def exchanged(tables: ShardedTables) -> list[StackLayout]:
  """The stacks whose rows are exchanged."""
  return [s for s in tables.layout.stacks if s.placement == "row" and tables.model > 1]


def count_bytes(tables: ShardedTables, batch: Batch, rounds: dict[str, int]) -> Bytes:
  """What a training step moves, from the shapes of its buffers and the rounds of row stacks."""
  model, devices = tables.model, tables.data * tables.model
  groups = 1 if tables.averaged else tables.data  # Whose gradients are combined.
  layout, out = tables.layout, Bytes()
  for s in layout.stacks:
    lookups = len(batch.weight_B) * sum(p.stack == s.name for p in layout.sparse) // devices
    for p in (p for p in layout.sequence if p.stack == s.name):
      lookups += len(batch.sequences[p.feature].values_E) // devices
    gathered = s.width * BYTES + BYTES  # Of a row: its gradient and its id.
    if s in exchanged(tables):
      turns, slots = rounds[s.name], tables.capacity[s.name]
      out["all-to-all", "rows"] += turns * (model - 1) * slots * s.width * 2 * BYTES
      # Plans keep the ids of the first round; those of others are sent to look up and to update.
      out["all-to-all", "ids"] += (2 * turns - 1) * (model - 1) * slots * BYTES
      out["all-gather", "data"] += turns * (groups - 1) * model * slots * gathered
    elif s.placement == "column" and model > 1:
      width = s.width // model
      out["all-to-all", "columns"] += (model - 1) * lookups * width * 2 * BYTES
      out["all-gather", "columns"] += (model - 1) * lookups * BYTES
      out["all-gather", "data"] += (groups - 1) * model * lookups * (width * BYTES + BYTES)
    else:
      what = "replicated" if s.placement == "replicated" else "data"
      out["all-gather", what] += (groups * model - 1) * min(lookups, s.rows + 1) * gathered
  return Bytes({key: devices * n for key, n in out.items()})


def program_bytes(trainer: Trainer, batch: Batch) -> dict[bool, Counter[str]]:
  """Whether in a loop of unknown length -> collective -> bytes that all devices receive.

  Of the compiled training step, where all-to-all and all-gather serve the tables alone: `Fm` has no
  kernel that is sharded. A further round is one turn of both such loops, look-up and update.
  """
  batch = to_devices(trainer.mesh, batch)
  placed = NamedSharding(trainer.mesh, BATCH)
  plans = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
    jax.eval_shape(functools.partial(plan_step, trainer), batch),
  )
  step = jax.jit(
    functools.partial(train_step, trainer),
    donate_argnums=(0, 1),
    out_shardings=(trainer.shardings, None, None),
  )
  lowered = step.lower(trainer.abstract(), plans, batch, batch)
  # Which moves the same, and is compiled in half the time.
  text = lowered.compile({"xla_backend_optimization_level": 0}).as_text()
  out = {False: Counter(), True: Counter()}
  for c in collectives(text, trainer.mesh.shape):
    if c.kind != "all-reduce":
      out[c.dynamic][c.kind] += c.bytes * c.trips * trainer.mesh.size
  return out


def features() -> FeatureSet:
  """39 categorical features and the history of one of them."""
  tables = [(f"C{i}", int(size)) for i, size in enumerate(SIZES, 1)]
  name, size = tables[-1]
  return FeatureSet(
    sparse=tuple(Sparse(name=n, table=n, size=s) for n, s in tables),
    sequence=(Sequence(name="history", table=name, size=size, max_length=LONGEST),),
  )


def draw_batch(kind: str, number: int, devices: int) -> Batch:
  """`uniform` ids, or `zipf`: P(row k) = log((k + 2) / (k + 1)) / log(rows + 1), about 1 / (k + 1),
  the popular rows first, as a vocabulary has them.
  """
  rng = np.random.default_rng([KINDS.index(kind), number])

  def draw(rows: int, count: int) -> np.ndarray:
    u = rng.random(count)
    return (u * rows if kind == "uniform" else (rows + 1) ** u - 1).astype(np.int32)

  batch_size = EXAMPLES * devices
  lengths_B = np.minimum(rng.geometric(1 / MEAN_EVENTS, batch_size), LONGEST).astype(np.int32)
  events_T = lengths_B.reshape(devices, -1).sum(1)
  values_TE = np.zeros((devices, event_capacity(int(events_T.max()))), np.int32)
  for values_E, events in zip(values_TE, events_T):
    values_E[:events] = draw(SIZES[-1], events)
  return Batch(
    dense_BF=np.zeros((batch_size, 0), np.float32),
    ids_BS=np.stack([draw(rows, batch_size) for rows in SIZES], 1),
    label_BT=np.zeros((batch_size, 1), np.float32),
    weight_B=np.ones(batch_size, np.float32),
    group_B=np.full(batch_size, -1, np.int32),
    oracle_BT=np.zeros((batch_size, 0), np.float32),
    sequences={"history": Jagged(values_TE.reshape(-1), lengths_B)},
  )


def _ratio(a: float, b: float) -> float | None:
  return a / b if b else None


def _rest(used: int, of: int) -> float | None:
  return 1 - used / of if of else None
