"""From a batch to positions, and from looked-up rows to units."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import FAST

from gemjax.config import Embedding
from gemjax.embedding import ShardedTables, assemble, layout_tables
from gemjax.embedding.lookup import mean_pool, positions
from gemjax.features import Batch, FeatureSet, Jagged, Sequence, Sparse, split_words

FEATURES = FeatureSet(
  sparse=(
    Sparse(name="user", size=100, table="user"),
    Sparse(name="item", size=70, table="item"),
    Sparse(name="last", size=70, table="item"),
    Sparse(name="sex", size=5, table="sex"),
    Sparse(name="day", size=9, table="day"),
  ),
  sequence=(Sequence(name="history", size=70, table="item", max_length=10),),
)


def config(**changes):
  return Embedding(dim=4, units={"user": 3}, small_rows=10, small_dim=2, **changes)


# Items by row, so that their positions are mixed; the rest replicated.
LAYOUT = layout_tables(FEATURES, config(placement={"item": "row"}))


def batch(lengths=(2, 0, 1)):
  n = len(lengths)
  rng = np.random.default_rng(0)
  ids = np.stack([rng.integers(0, s.size, n) for s in FEATURES.sparse], 1).astype(np.int32)
  values = np.zeros(8, np.int32)
  values[: sum(lengths)] = rng.integers(1, 70, sum(lengths))
  return Batch(
    dense_BF=np.zeros((n, 0), np.float32),
    ids_BS=ids,
    label_BT=np.zeros((n, 1), np.float32),
    weight_B=np.ones(n, np.float32),
    group_B=np.zeros(n, np.int32),
    oracle_BT=np.zeros((n, 0), np.float32),
    sequences={"history": Jagged(values, np.array(lengths, np.int32))},
  )


def at(table, row):
  stack, offset = LAYOUT.positions(table)
  return stack.name, (offset + int(row)) * stack.multiplier % stack.rows


def test_every_unit_is_the_row_that_its_feature_names():
  b = batch()
  # A stack whose row i holds i, i + 1/W, ...: what is read tells where it was read.
  tables = {
    s.name: np.arange(s.rows)[:, None] + np.arange(s.width) / s.width for s in LAYOUT.stacks
  }
  rows = {}
  for name, position_M in positions(LAYOUT, b).items():
    padded = np.concatenate([tables[name], np.zeros_like(tables[name][:1])])
    rows[name] = jnp.asarray(padded[np.asarray(position_M)], jnp.float32)
  seen = lambda table, row: tables[at(table, row)[0]][at(table, row)[1]]
  units, small, _ = assemble(LAYOUT, rows, b)
  assert units.shape == (3, 3 + 2 + 1, 4) and small.shape == (3, 2, 2)
  for e in range(3):
    user, item, last, sex, day = b.ids_BS[e]
    np.testing.assert_allclose(units[e, :3].reshape(-1), seen("user", user), rtol=1e-6)
    np.testing.assert_allclose(units[e, 3], seen("item", item), rtol=1e-6)
    np.testing.assert_allclose(units[e, 4], seen("item", last), rtol=1e-6)
    np.testing.assert_allclose(small[e], [seen("sex", sex), seen("day", day)], rtol=1e-6)
  values = b.sequences["history"].values_E
  events = np.stack([seen("item", v) for v in values])
  np.testing.assert_allclose(units[0, 5], events[:2].mean(0), rtol=1e-6)
  np.testing.assert_allclose(units[1, 5], 0)
  np.testing.assert_allclose(units[2, 5], events[2], rtol=1e-6)


def test_the_gradient_goes_to_the_rows_and_a_lookup_reads_what_init_made():
  """On one device, without a mesh: every unit by ids, and the gradient of a mean by counting."""
  tables = ShardedTables(layout=LAYOUT, config=config(init_scale=1.0), data=1, model=1)
  b = batch()

  @functools.partial(jax.jit, compiler_options=FAST)
  def read(b):
    stacks = tables.init(jax.random.key(0))
    return stacks, tables.lookup(stacks, tables.plan(b))

  stacks, rows = read(b)
  for name, position_M in positions(LAYOUT, b).items():
    used_M = np.asarray(position_M) < len(stacks[name].rows_RW)
    expected = np.asarray(stacks[name].rows_RW)[np.asarray(position_M)[used_M]]
    np.testing.assert_array_equal(np.asarray(rows[name])[used_M], expected)
    assert not np.any(np.asarray(rows[name])[~used_M])
  grads = jax.grad(lambda rows: assemble(LAYOUT, rows, b)[0].sum())(rows)
  name = LAYOUT.positions("item")[0].name
  assert grads[name].shape == (2 * 3 + 8, 4)  # Two features, eight slots for events.
  np.testing.assert_array_equal(grads[name][:6], 1)
  np.testing.assert_array_equal(grads[name][6:, 0], [0.5, 0.5, 1, 0, 0, 0, 0, 0])


def test_pooling_ignores_what_lies_behind_the_events():
  rows = jnp.asarray([[1.0], [3.0], [5.0], [jnp.nan]])
  pooled = mean_pool(rows, np.array([0, 2, 1], np.int32))
  np.testing.assert_allclose(pooled, [[0], [2], [5]])


def test_events_behind_the_last_one_stand_one_beyond_the_last_row():
  stack = LAYOUT.positions("item")[0]
  position_M = np.asarray(positions(LAYOUT, batch((1, 1, 0)))[stack.name])
  assert position_M.dtype == np.uint64
  assert np.all(position_M[-6:] == stack.rows) and np.all(position_M[:-6] < stack.rows)


@pytest.mark.parametrize("lengths", [(2, 0, 1), (0, 0, 0)])
def test_ids_in_two_words_stand_where_ids_in_one_stand(lengths):
  """In a wide feature set small tables have words as well."""
  b = batch(lengths)
  history = b.sequences["history"]
  words = b._replace(
    ids_BS=split_words(b.ids_BS),
    sequences={"history": Jagged(split_words(history.values_E), history.lengths_B)},
  )
  one, two = positions(LAYOUT, b), positions(LAYOUT, words)
  for name in one:
    np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(two[name]))
