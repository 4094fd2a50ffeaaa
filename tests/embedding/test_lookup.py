"""Placement of tables, and the way from a batch to units."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gemjax.config import ConfigError, Embedding
from gemjax.embedding import assemble, layout_tables, mean_pool, stack_ids
from gemjax.features import Batch, FeatureSet, Jagged, Sequence, Sparse

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
CONFIG = Embedding(dim=4, units={"user": 3}, small_rows=10, small_dim=2)


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


def test_tables_of_equal_width_are_stacked_and_shared_tables_appear_once():
  layout = layout_tables(FEATURES, CONFIG)
  assert dict(layout.rows) == {12: 100, 4: 70, 2: 14}
  places = {p.feature: p for p in (*layout.sparse, *layout.sequence)}
  assert places["item"].offset == places["last"].offset == places["history"].offset == 0
  assert (places["sex"].small, places["day"].offset, places["user"].units) == (True, 5, 3)


def test_every_unit_is_the_row_that_its_feature_names():
  layout, b = layout_tables(FEATURES, CONFIG), batch()
  ids = stack_ids(layout, b)
  # A stack whose row i holds i, i + 1/W, ...: what is read tells where it was read.
  tables = {w: np.arange(r)[:, None] + np.arange(w) / w for w, r in layout.rows}
  padded = {w: np.concatenate([t, np.zeros((1, w))]) for w, t in tables.items()}
  rows = {w: jnp.asarray(padded[w][np.asarray(ids[w])], jnp.float32) for w in tables}
  units, small = assemble(layout, rows, b)
  assert units.shape == (3, 3 + 2 + 1, 4) and small.shape == (3, 2, 2)
  for e in range(3):
    user, item, last, sex, day = b.ids_BS[e]
    np.testing.assert_allclose(units[e, :3].reshape(-1), tables[12][user], rtol=1e-6)
    np.testing.assert_allclose(units[e, 3], tables[4][item], rtol=1e-6)
    np.testing.assert_allclose(units[e, 4], tables[4][last], rtol=1e-6)
    np.testing.assert_allclose(small[e], tables[2][[sex, 5 + day]], rtol=1e-6)
  values = b.sequences["history"].values_E
  np.testing.assert_allclose(units[0, 5], tables[4][values[:2]].mean(0), rtol=1e-6)
  np.testing.assert_allclose(units[1, 5], 0)
  np.testing.assert_allclose(units[2, 5], tables[4][values[2]], rtol=1e-6)


def test_pooling_ignores_poison_behind_the_events():
  rows = jnp.asarray([[1.0], [3.0], [5.0], [jnp.nan]])
  pooled = mean_pool(rows, Jagged(np.zeros(4, np.int32), np.array([0, 2, 1], np.int32)))
  np.testing.assert_allclose(pooled, [[0], [2], [5]])


def test_events_behind_the_last_one_read_padding():
  ids = stack_ids(layout_tables(FEATURES, CONFIG), batch((1, 1, 0)))
  assert np.all(np.asarray(ids[4])[-6:] == 70)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"units": {"usr": 2}}, "names 'usr', but the features are"),
    ({"units": {"item": 2, "last": 3}}, "share table 'item'"),
  ],
)
def test_a_config_that_does_not_fit_the_features_names_the_field(change, message):
  with pytest.raises(ConfigError, match=message):
    layout_tables(FEATURES, dataclasses.replace(CONFIG, **change))


def test_a_stack_of_more_rows_than_int32_counts_is_refused():
  big = FeatureSet(sparse=tuple(Sparse(name=n, size=2**30, table=n) for n in "abc"))
  with pytest.raises(ConfigError, match=r"3221225472 rows, but a row number must stay below 2\^31"):
    layout_tables(big, Embedding(dim=4))
