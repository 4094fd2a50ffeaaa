"""Look-ups of events: where they stand, what a model reads, which rows learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import FAST

from gemjax.config import Embedding
from gemjax.embedding import ShardedTables, assemble, candidate_units, layout_tables
from gemjax.embedding.lookup import positions
from gemjax.features import (
  Batch,
  EventColumn,
  Events,
  FeatureSet,
  History,
  Jagged,
  Sequence,
  Sparse,
  split_words,
)

D = 4
ITEM = EventColumn(name="item", size=70, table="item")
FEATURES = FeatureSet(
  sparse=(
    Sparse(name="user", size=100, table="user"),
    Sparse(name="kind", size=9, table="kind"),
    Sparse(name="item", size=70, table="item"),
    Sparse(name="last", size=70, table="item"),
    Sparse(name="sex", size=5, table="sex"),
  ),
  sequence=(Sequence(name="pages", size=70, table="item", max_length=4),),
  history=(
    History(
      name="views",
      columns=(
        EventColumn(name="action", size=6, table="action"),
        ITEM,
        EventColumn(name="kind", size=9, table="kind"),
      ),
      max_length=5,
    ),
    History(name="buys", columns=(ITEM,), max_length=5),
  ),
)
LENGTHS = {"views": (2, 0, 3), "buys": (0, 1, 2)}


def config(**changes):
  return Embedding(
    dim=D, units={"user": 3, "item": 2}, small_rows=10, small_dim=2, placement={"item": "row"},
    **changes,
  )  # fmt: skip


LAYOUT = layout_tables(FEATURES, config())


def batch(lengths=LENGTHS) -> Batch:
  """In the room behind the events stand ids of other rows."""
  rng = np.random.default_rng(0)
  draw = lambda columns, n: np.stack([rng.integers(0, f.size, n) for f in columns], 1)
  histories = {}
  for history in FEATURES.history:
    ids_EC = draw(history.columns, 8).astype(np.int32)
    age_E = np.ones(8, np.int32)
    histories[history.name] = Events(ids_EC, age_E, np.array(lengths[history.name], np.int32))
  return Batch(
    dense_BF=np.zeros((3, 0), np.float32),
    ids_BS=draw(FEATURES.sparse, 3).astype(np.int32),
    label_BT=np.zeros((3, 1), np.float32),
    weight_B=np.ones(3, np.float32),
    group_B=np.zeros(3, np.int32),
    oracle_BT=np.zeros((3, 0), np.float32),
    sequences={"pages": Jagged(np.array([7, 8, 9, 9], np.int32), np.array([1, 0, 2], np.int32))},
    histories=histories,
  )


def at(table, row):
  stack, offset = LAYOUT.positions(table)
  return stack.name, (offset + int(row)) * stack.multiplier % stack.rows


# A stack whose row i holds i, i + 1/W, ...: what is read tells where it was read.
TABLES = {s.name: np.arange(s.rows)[:, None] + np.arange(s.width) / s.width for s in LAYOUT.stacks}


def looked(b):
  rows = {}
  for name, position_M in positions(LAYOUT, b).items():
    padded = np.concatenate([TABLES[name], np.zeros_like(TABLES[name][:1])])
    rows[name] = jnp.asarray(padded[np.asarray(position_M)], jnp.float32)
  return assemble(LAYOUT, rows, b)


def test_units_of_an_event_are_the_rows_of_its_columns():
  b = batch()
  found = looked(b).events_EFD
  assert list(found) == ["views", "buys"]
  for history in FEATURES.history:
    ids_EC, _, lengths_B = b.histories[history.name]
    for e in range(len(ids_EC)):
      places = [at(column.table, row) for column, row in zip(history.columns, ids_EC[e])]
      wanted = [TABLES[stack][row].reshape(-1, D) for stack, row in places]
      wanted = np.concatenate(wanted) * (e < lengths_B.sum())
      np.testing.assert_allclose(found[history.name][e], wanted, rtol=1e-6)


def test_other_units_are_what_they_are_without_events():
  with_events, none = looked(batch()), looked(batch(dict.fromkeys(LENGTHS, (0, 0, 0))))
  np.testing.assert_array_equal(with_events.units_BND, none.units_BND)
  np.testing.assert_array_equal(with_events.small_BSW, none.small_BSW)
  assert not any(x.any() for x in none.events_EFD.values())


def test_the_candidate_is_the_unit_of_the_first_feature_that_reads_the_table():
  """An event whose ids are those of its example reads the same units."""
  b = batch({"views": (1, 1, 1), "buys": (1, 1, 1)})
  _, kind, item, last, _ = b.ids_BS.T
  assert (item != last).all()
  b.histories["views"].ids_EC[:3] = np.stack([0 * kind, item, kind], 1)
  b.histories["buys"].ids_EC[:3, 0] = item
  found = looked(b)
  views, buys = candidate_units(LAYOUT, "views"), candidate_units(LAYOUT, "buys")
  assert len(views) == 1 + 2 + 1 and len(buys) == 2
  assert views[0] == -1 and min(views[1:] + buys) >= 0
  for name, units in (("views", views), ("buys", buys)):
    for f, place in enumerate(units):
      if place >= 0:
        mine = found.units_BND[:, place]
        np.testing.assert_array_equal(found.events_EFD[name][:3, f], mine)


def test_rows_of_events_learn_and_no_others():
  """Under SGD a row moves by the sum over the events that name it; the room moves none."""
  tables = ShardedTables(
    layout=LAYOUT, config=config(optimizer="sgd", init_scale=1.0), data=1, model=1
  )
  b, rng = batch(), np.random.default_rng(1)
  units = {"views": 4, "buys": 2}
  coef = {n: rng.integers(1, 9, (8, u, D)).astype(np.float32) for n, u in units.items()}

  @functools.partial(jax.jit, compiler_options=FAST)
  def step(b, coef):
    stacks, plans = tables.init(jax.random.key(0)), tables.plan(b)

    def loss(rows):
      events_EFD = assemble(LAYOUT, rows, b).events_EFD
      return sum((events_EFD[name] * coef[name]).sum() for name in coef)

    grads = jax.grad(loss)(tables.lookup(stacks, plans))
    return stacks, tables.update(stacks, plans, grads, 0.5, jax.random.key(1))

  before, after = jax.device_get(step(b, coef))
  wanted = {name: stack.rows_RW.astype(np.float64) for name, stack in before.items()}
  moved = {name: np.zeros(len(rows), bool) for name, rows in wanted.items()}
  for history in FEATURES.history:
    ids_EC, _, lengths_B = b.histories[history.name]
    for e in range(lengths_B.sum()):
      unit = 0
      for column, row in zip(history.columns, ids_EC[e]):
        stack, place = at(column.table, row)
        more = wanted[stack].shape[1] // D
        wanted[stack][place] -= 0.5 * coef[history.name][e, unit : unit + more].reshape(-1)
        moved[stack][place], unit = True, unit + more
  for name, stack in after.items():
    np.testing.assert_allclose(stack.rows_RW, wanted[name], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal((stack.rows_RW != before[name].rows_RW).any(1), moved[name])


@pytest.mark.parametrize("lengths", [LENGTHS, dict.fromkeys(LENGTHS, (0, 0, 0))])
def test_ids_in_two_words_stand_where_ids_in_one_stand(lengths):
  b = batch(lengths)
  split = lambda x: x._replace(**{x._fields[0]: split_words(x[0])})
  words = b._replace(
    ids_BS=split_words(b.ids_BS),
    sequences={n: split(x) for n, x in b.sequences.items()},
    histories={n: split(x) for n, x in b.histories.items()},
  )
  one, two = positions(LAYOUT, b), positions(LAYOUT, words)
  for name in one:
    np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(two[name]))
