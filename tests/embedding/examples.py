"""Features whose tables lie in every way on a mesh, batches of every kind, and what they ask of
whole tables.

The same examples on every mesh; only the packing of events follows the devices. The loss is
sum(units_BND * coef_BND), linear, so that the gradient of every row is known without autodiff.
"""

import functools

import numpy as np
from dense import DenseTable, summed

from gemjax.config import Embedding
from gemjax.embedding import layout_tables
from gemjax.features import Batch, FeatureSet, Jagged, Sequence, Sparse

B, N, D = 48, 12, 4
KINDS = ("zipf", "uniform", "equal", "one owner", "empty bags", "idle device")
FEATURES = FeatureSet(
  sparse=(
    Sparse(name="user", size=2_000, table="user"),  # By row.
    Sparse(name="item", size=900, table="item"),  # By row, shared with the history.
    Sparse(name="hour", size=26, table="hour"),  # Replicated.
    Sparse(name="wide", size=300, table="wide"),  # By column.
  ),
  sequence=(
    Sequence(name="history", size=900, table="item", max_length=4),
    Sequence(name="pages", size=700, table="page", max_length=4),  # By row, in a stack alone.
  ),
)
# Units of every feature, in the order of the stacks.
UNITS = {"user": (0, 1), "item": (1, 2), "history": (2, 3), "hour": (3, 4), "wide": (4, 10)}
UNITS |= {"pages": (10, 12)}


def embedding(**changes) -> Embedding:
  return Embedding(
    dim=D, units={"wide": 6, "pages": 2}, replicated_rows=100, placement={"wide": "column"},
    init_scale=1.0, **changes,
  )  # fmt: skip


LAYOUT = layout_tables(FEATURES, embedding())


def place(table, row):
  """Where a row of a table lies in its stack, as TableLayout.positions promises."""
  stack, offset = LAYOUT.positions(table)
  return (np.asarray(row) + offset) * stack.multiplier % stack.rows


@functools.cache
def owned(table):
  """Rows in the first 24th of their stack: all with the first owner, on every mesh."""
  rows = np.arange(FEATURES.tables[table])
  return rows[place(table, rows) < LAYOUT.positions(table)[0].rows // 24]


@functools.cache
def make_batch(kind, t, shards=1, repeat=1) -> Batch:
  """Lengths are 0, 1, 2 or 4, so that means of dyadic numbers are exact.

  The first `repeat`-th of the examples comes `repeat` times.
  """
  rng = np.random.default_rng([KINDS.index(kind), t])
  draw = lambda f, *shape: np.minimum(rng.zipf(1.2, shape), f.size) - 1
  if kind == "uniform":
    draw = lambda f, *shape: rng.integers(0, f.size, shape)
  elif kind == "equal":
    draw = lambda f, *shape: np.full(shape, 4)
  elif kind == "one owner":
    draw = lambda f, *shape: rng.choice(
      owned(f.table) if f.size > 400 else np.arange(f.size), shape
    )
  example_B = np.arange(B) % (B // repeat)
  ids_BS = np.stack([draw(f, B)[example_B] for f in FEATURES.sparse], 1)
  sequences = {}
  for f in FEATURES.sequence:
    lengths_B = rng.choice([0, 1, 2, 4], B)[example_B]
    if kind == "empty bags":
      lengths_B[:] = 0
    elif kind == "idle device":
      lengths_B[: B // 3] = 0
    sequences[f.name] = Jagged(_pack(draw(f, B, 4)[example_B], lengths_B, shards), lengths_B)
  return Batch(
    dense_BF=np.zeros((B, 0), np.float32),
    ids_BS=ids_BS.astype(np.int32),
    label_BT=np.zeros((B, 1), np.float32),
    weight_B=np.ones(B, np.float32),
    group_B=np.zeros(B, np.int32),
    oracle_BT=np.zeros((B, 0), np.float32),
    sequences=sequences,
  )


def _pack(events_BE, lengths_B, shards):
  """Every shard's events at the front of its slots; garbage behind them."""
  used_BE = np.arange(4) < lengths_B[:, None]
  out = np.full((shards, 4 * B // shards), 3, np.int32)
  for part, events, used in zip(out, np.split(events_BE, shards), np.split(used_BE, shards)):
    part[: used.sum()] = events[used]
  return out.reshape(-1)


def make_coef(t, exact=True):
  """coef_BND; `exact`: of so few bits that sums of gradients are exact in any order."""
  rng = np.random.default_rng([9, t])
  coef_BND = rng.integers(-12, 13, (B, N, D)) / 8 if exact else rng.normal(size=(B, N, D))
  return coef_BND.astype(np.float32)


def looked_up(kind, t, repeat=1):
  """(feature, example, row, share of the example's mean) of every look-up of a batch."""
  batch = make_batch(kind, t, repeat=repeat)
  for column, f in enumerate(FEATURES.sparse):
    for b in range(B):
      yield f, b, batch.ids_BS[b, column], 1.0
  for f in FEATURES.sequence:
    values_E, lengths_B = batch.sequences[f.name]
    for b, row in zip(np.repeat(np.arange(B), lengths_B), values_E):
      yield f, b, row, 1.0 / lengths_B[b]


def gradients(kind, t, coef_BND, examples=range(B), repeat=1):
  """Table -> (grad_RW, touched_R) in float64, of some of the examples."""
  rows, grads = {table: [] for table in FEATURES.tables}, {table: [] for table in FEATURES.tables}
  for f, b, row, share in looked_up(kind, t, repeat):
    if b in examples:
      rows[f.table].append(row)
      grads[f.table].append(share * coef_BND[b, slice(*UNITS[f.name])].astype(np.float64).ravel())
  width = {table: LAYOUT.positions(table)[0].width for table in rows}
  return {
    table: summed(size, rows[table], np.reshape(grads[table], (-1, width[table])))
    for table, size in FEATURES.tables.items()
  }


def units(kind, t, tables, repeat=1):
  """units_BND in float64 of whole tables, by table name."""
  out_BND = np.zeros((B, N, D))
  for f, b, row, share in looked_up(kind, t, repeat):
    cut = slice(*UNITS[f.name])
    out_BND[b, cut] += share * tables[f.table].w[row].reshape(-1, D)
  return out_BND


def wanted(kind, t, devices, model):
  """Row stack -> device -> owner -> the different rows that the device wants of it, ascending."""
  sets = {s.name: [set() for _ in range(devices)] for s in LAYOUT.stacks if s.placement == "row"}
  for f, b, row, _ in looked_up(kind, t):
    stack = LAYOUT.positions(f.table)[0]
    if stack.name in sets:
      sets[stack.name][b * devices // B].add(int(place(f.table, row)))
  share = {s.name: s.rows // model for s in LAYOUT.stacks}
  return {
    name: [[sorted(p for p in s if p // share[name] == o) for o in range(model)] for s in of_device]
    for name, of_device in sets.items()
  }


def rounds(wanted, capacity):
  """Of one stack: a round ends for all where the first device's buffer for that owner is full."""
  most = 1
  for of_device in zip(*wanted):
    taken = 0
    while any(of_device):
      full = [rows[capacity - 1] for rows in of_device if len(rows) > capacity]
      last = min(full, default=np.inf)
      of_device, taken = [[r for r in rows if r > last] for rows in of_device], taken + 1
    most = max(most, taken)
  return most


def dense_tables(stacks, config, **changes):
  """Table -> DenseTable that goes on from where a rule's stacks (numpy) are."""
  out = {}
  for table, size in FEATURES.tables.items():
    stack, at = stacks[LAYOUT.positions(table)[0].name], place(table, np.arange(size))
    rows_RW = np.asarray(stack.rows_RW[at], np.float64)
    dense = DenseTable(rows_RW, config.optimizer, config.weight_decay, config.l2, **changes)
    for name, x in stack.slots.items():
      setattr(dense, name, np.asarray(x[at], np.float64))
    if stack.clock is not None:  # Shrinking that is due but not written.
      missed_R = float(stack.clock[0]) - np.asarray(stack.marks_R[at], np.float64)
      dense.w *= np.exp(-missed_R[:, None] * (config.l2 * dense.scale() if config.l2 else 1.0))
    out[table] = dense
  return out
