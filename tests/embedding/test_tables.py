"""The rule that places tables, its reasons, and what it refuses."""

import dataclasses
import math

import numpy as np
import pytest

from gemjax.config import ConfigError, Embedding
from gemjax.embedding import ShardedTables, layout_tables
from gemjax.embedding.tables import MAX_ROWS, ROW_MULTIPLE, check_mesh
from gemjax.features import EventColumn, FeatureSet, History, Sequence, Sparse

CONFIG = Embedding(dim=4, units={"user": 3, "vector": 512}, small_rows=10, small_dim=2)


def sparse(**sizes):
  return FeatureSet(sparse=tuple(Sparse(name=n, size=s, table=n) for n, s in sizes.items()))


FEATURES = FeatureSet(
  sparse=(
    Sparse(name="user", size=5_000, table="user"),
    Sparse(name="item", size=7_000, table="item"),
    Sparse(name="last", size=7_000, table="item"),
    Sparse(name="shop", size=1_025, table="shop"),
    Sparse(name="city", size=1_024, table="city"),
    Sparse(name="sex", size=5, table="sex"),
    Sparse(name="day", size=9, table="day"),
    Sparse(name="vector", size=2_000, table="vector"),
  ),
  sequence=(Sequence(name="history", size=7_000, table="item", max_length=10),),
)


def where(layout):
  tables = {p.table for p in (*layout.sparse, *layout.sequence)}
  return {t: layout.positions(t)[0].placement for t in tables}


def test_tables_are_placed_by_rows_and_by_width():
  layout = layout_tables(FEATURES, CONFIG)
  assert where(layout) == {
    "user": "row", "item": "row", "shop": "row", "city": "replicated", "sex": "replicated",
    "day": "replicated", "vector": "column",
  }  # fmt: skip
  assert layout.reasons == (
    "3 replicated (at most 1,024 rows)",
    "3 row (more than 1,024 rows)",
    "1 column (at least 2,048 wide)",
  )


def test_tables_of_equal_width_and_placement_share_a_stack_and_shared_tables_appear_once():
  layout = layout_tables(FEATURES, CONFIG)
  padded = lambda rows: math.ceil(rows / ROW_MULTIPLE) * ROW_MULTIPLE
  assert {(s.name, s.width, s.rows, s.small) for s in layout.stacks} == {
    ("row12", 12, padded(5_000), False),
    ("row4", 4, padded(7_000 + 1_025), False),
    ("replicated4", 4, 1_024, False),
    ("replicated2_small", 2, 5 + 9, True),
    ("column2048", 2_048, 2_000, False),
  }
  places = {p.feature: p for p in (*layout.sparse, *layout.sequence)}
  assert places["item"].offset == places["last"].offset == places["history"].offset == 0
  assert (places["shop"].offset, places["day"].offset) == (7_000, 5)
  assert (places["sex"].small, places["user"].units, places["vector"].units) == (True, 3, 512)
  assert [p.column for p in layout.sparse] == list(range(8)) and places["history"].column == -1


def test_a_small_table_of_named_units_or_of_a_sequence_is_not_small():
  layout = layout_tables(
    FeatureSet(
      sparse=(Sparse(name="a", size=5, table="a"), Sparse(name="b", size=5, table="b")),
      sequence=(Sequence(name="c", size=5, table="b", max_length=3),),
    ),
    dataclasses.replace(CONFIG, units={"a": 1}),
  )
  assert [(s.width, s.small) for s in layout.stacks] == [(4, False)]


def test_a_feature_of_no_units_has_no_table():
  out = dataclasses.replace(CONFIG, units=CONFIG.units | {"city": 0, "sex": 0})
  layout, before = layout_tables(FEATURES, out), layout_tables(FEATURES, CONFIG)
  assert set(layout.tables) == set(before.tables) - {"city", "sex"}
  left = [p for p in before.sparse if p.table not in ("city", "sex")]
  assert [(p.feature, p.column) for p in layout.sparse] == [(p.feature, p.column) for p in left]
  assert {s.name: s.rows for s in layout.stacks} == {
    s.name: {"replicated2_small": 9}.get(s.name, s.rows)
    for s in before.stacks
    if s.name != "replicated4"
  }


def test_a_table_that_a_history_reads_cannot_be_left_out():
  history = History(name="seen", columns=(EventColumn(name="x", size=7_000, table="item"),),
                    max_length=5)  # fmt: skip
  features = dataclasses.replace(FEATURES, history=(history,))
  units = {"item": 0, "last": 0, "history": 0}
  with pytest.raises(ConfigError, match=r"leaves table 'item' out, but history 'seen' reads it"):
    layout_tables(features, dataclasses.replace(CONFIG, units=units))


def test_a_table_goes_where_the_config_says():
  placement = {"user": "column", "city": "row", "vector": "replicated"}
  layout = layout_tables(FEATURES, dataclasses.replace(CONFIG, placement=placement))
  assert where(layout) | placement == where(layout)
  assert where(layout)["shop"] == "row"
  assert layout.reasons == (
    "2 replicated (at most 1,024 rows)",
    "1 replicated (config.embedding.placement)",
    "2 row (more than 1,024 rows)",
    "1 row (config.embedding.placement)",
    "1 column (config.embedding.placement)",
  )


def test_no_two_rows_share_a_position():
  layout = layout_tables(FEATURES, CONFIG)
  taken = {s.name: np.zeros(s.rows, int) for s in layout.stacks}
  for table, size in FEATURES.tables.items():
    stack, offset = layout.positions(table)
    np.add.at(taken[stack.name], (np.arange(size) + offset) * stack.multiplier % stack.rows, 1)
  for stack in layout.stacks:
    assert taken[stack.name].max() == 1 and math.gcd(stack.multiplier, stack.rows) == 1
    assert stack.placement == "row" or (taken[stack.name].min() == 1 and stack.multiplier == 1)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"units": {"usr": 2}}, "names 'usr', but the features are"),
    ({"units": {"item": 2, "last": 3}}, "share table 'item'"),
    ({"placement": {"usr": "row"}}, r"placement names 'usr', but the tables are \['user', 'item'"),
    ({"placement": {"last": "row"}}, "placement names 'last'"),  # A feature, of table item.
  ],
)
def test_a_config_that_does_not_fit_the_features_names_the_field(change, message):
  with pytest.raises(ConfigError, match=message):
    layout_tables(FEATURES, dataclasses.replace(CONFIG, **change))


@pytest.mark.parametrize(
  ("sizes", "change", "message"),
  [
    ({"a": MAX_ROWS + 1}, {}, r"row stack of width 4 would have 17,179,869,\d+ rows; .* 2\^34"),
    (dict.fromkeys("abc", 2**33), {}, r"would have 25,769,803,776 rows"),
    ({"a": 2**31}, {"placement": {"a": "replicated"}}, r"replicated stack .* fewer than 2\^31"),
    ({"a": 2**31}, {"column_width": 4}, r"column stack .* fewer than 2\^31"),
  ],
)
def test_a_stack_of_too_many_rows_is_refused(sizes, change, message):
  with pytest.raises(ConfigError, match=message):
    layout_tables(sparse(**sizes), Embedding(dim=4, **change))


@pytest.mark.parametrize(
  ("sizes", "change", "model", "message"),
  [
    ({"a": 5_000}, {"placement": {"a": "column"}}, 3, "column4 of width 4 must divide by the 3"),
    ({"a": 5_000}, {}, 5, r"mesh\.model is 5, but the 5,376 rows of stack row4 .* divisor of 768"),
    ({"a": 2**32}, {}, 2, r"would hold 2,147,483,\d+ rows of stack row4, .* below 2\^31; raise"),
    ({"a": 2**31}, {}, 1, r"raise config\.mesh\.model above 1"),
  ],
)
def test_a_mesh_that_does_not_fit_names_the_stack_and_the_mend(sizes, change, model, message):
  config = Embedding(dim=4, **change)
  layout = layout_tables(sparse(**sizes), config)
  with pytest.raises(ConfigError, match=message):
    check_mesh(layout, model)
  with pytest.raises(ConfigError, match=message):
    ShardedTables.on_mesh(layout, config, 1, model)


def test_meshes_of_every_usual_size_fit():
  layout = layout_tables(sparse(a=5_000, b=2**31, c=26), Embedding(dim=4))
  for model in (2, 3, 4, 6, 8, 16, 24, 32, 64, 128, 256):
    check_mesh(layout, model)


@pytest.mark.parametrize("stride", [1, 8, 768])
@pytest.mark.parametrize("rows", [100_000, 40_000_000, 5_000_000_000, 17_000_000_000])
def test_popular_rows_spread_over_owners(rows, stride):
  """Different rows of a batch that a device wants of each of L owners, under Zipf over `rank`,
  where row = stride * rank: a vocabulary sorted by frequency, or ids that are all multiples.
  """
  layout = layout_tables(sparse(a=rows), Embedding(dim=4))
  stack, offset = layout.positions("a")
  rank = np.random.default_rng(0).zipf(1.1, 300_000)
  row = np.unique(rank[rank < (rows - 2) // stride] * stride + 2)[:20_000]  # The popular ones.
  assert len(row) == 20_000 or len(row) > 0.5 * rows / stride
  position = [(int(r) + offset) * stack.multiplier % stack.rows for r in row]
  for owners in (2, 8, 64):
    count = np.bincount([p // (stack.rows // owners) for p in position], minlength=owners)
    # Chance alone would give six standard deviations more than the mean, hardly ever.
    mean = len(row) / owners
    assert count.max() < mean + 6 * math.sqrt(mean), (owners, count.max(), mean)
