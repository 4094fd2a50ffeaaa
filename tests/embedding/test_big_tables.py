"""Rows beyond 2^31 and 2^32: their positions, owners and keys, without the memory of the tables."""

import functools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from meshes import ALL, FAST, ONE

from gemjax.config import Embedding
from gemjax.embedding import ShardedTables, layout_tables
from gemjax.embedding.held import Held, row_keys
from gemjax.embedding.lookup import positions
from gemjax.embedding.row import RowSharded
from gemjax.features import Batch, FeatureSet, Jagged, Sequence, Sparse, split_words

ROWS, L, B = 5_000_000_000, 8, 32
FEATURES = FeatureSet(
  sparse=(Sparse(name="user", size=100, table="user"), Sparse(name="ad", size=ROWS, table="ad")),
  sequence=(Sequence(name="history", size=ROWS, table="ad", max_length=2),),
)
CONFIG = Embedding(dim=4, placement={"user": "row"})
LAYOUT = layout_tables(FEATURES, CONFIG)
(STACK,) = LAYOUT.stacks
SHARE = STACK.rows // L  # Rows of a device.
TABLES = ShardedTables.on_mesh(LAYOUT, CONFIG, 1, L).with_capacity({STACK.name: B})
EDGES = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32, 2**32 + 1, ROWS - 2, ROWS - 1]


def batch():
  rng = np.random.default_rng(0)
  ids = np.stack([rng.integers(0, 100, B), rng.integers(0, ROWS, B)], 1)
  ids[: len(EDGES), 1] = EDGES
  ids[-3:, 1] = 7, 7 + 2**32, 7 + 2**32  # Agree in the low word; a duplicate.
  lengths = np.full(B, 2, np.int32)
  lengths[3] = 0
  per = B // L
  events = rng.integers(0, ROWS, (L, 3 * per))
  return Batch(
    dense_BF=np.zeros((B, 0), np.float32),
    ids_BS=split_words(ids),
    label_BT=np.zeros((B, 1), np.float32),
    weight_B=np.ones(B, np.float32),
    group_B=np.zeros(B, np.int32),
    oracle_BT=np.zeros((B, 0), np.float32),
    sequences={"history": Jagged(split_words(events.reshape(-1)), lengths)},
  )


def expected_positions():
  """Device -> positions by Python's whole numbers, in the order of the look-ups."""
  b, per = batch(), B // L
  join = lambda words: int(words[0]) + 2**32 * int(words[1])
  place = lambda table, row: (LAYOUT.positions(table)[1] + row) * STACK.multiplier % STACK.rows
  history, out = b.sequences["history"], []
  for d in range(L):
    ids_BS = b.ids_BS[d * per : (d + 1) * per]
    at = [place(t, join(w)) for example in ids_BS for t, w in zip(("user", "ad"), example)]
    events = [join(w) for w in history.values_E.reshape(L, 3 * per, 2)[d]]
    used = history.lengths_B[d * per : (d + 1) * per].sum()
    at += [place("ad", row) if e < used else STACK.rows for e, row in enumerate(events)]
    out.append(at)
  return out


def on_devices(function, in_specs, out_specs):
  mesh = meshes.make_mesh(1, L)
  sharded = jax.shard_map(
    function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )
  return jax.jit(sharded, compiler_options=FAST)


@pytest.fixture(scope="module")
def seen():
  """(positions, rows wanted of every device, bucket sizes), of one program."""

  def look(batch):
    plan = TABLES.plan(batch)[STACK.name]
    at = positions(LAYOUT, batch)[STACK.name]
    return at, plan.first.wanted_N, TABLES.bucket_sizes(batch)[STACK.name]

  return jax.tree.map(np.asarray, on_devices(look, (ALL,), ALL)(batch()))


def test_positions_are_those_of_whole_numbers(seen):
  assert seen[0].dtype == np.uint64
  assert seen[0].reshape(L, -1).tolist() == expected_positions()


def test_owners_are_asked_for_their_own_rows(seen):
  wanted = seen[1].reshape(L, L, -1)  # Owner, asking device, capacity.
  sizes = seen[2].reshape(L, L)  # Asking device, owner.
  for d, at in enumerate(expected_positions()):
    for owner in range(L):
      rows = sorted({p - owner * SHARE for p in at if p // SHARE == owner})
      assert sizes[d, owner] == len(rows)
      assert wanted[owner, d, : len(rows)].tolist() == rows
      assert np.all(wanted[owner, d, len(rows) :] == SHARE)


def test_positions_are_one_to_one():
  rng = np.random.default_rng(1)
  rows = np.unique(np.concatenate([EDGES, rng.integers(0, ROWS, 50_000), 2**32 + np.arange(9_999)]))
  offset = LAYOUT.positions("ad")[1]
  at = [(offset + int(row)) * STACK.multiplier % STACK.rows for row in rows]
  assert len(set(at)) == len(rows)


def test_a_device_of_nearly_2_31_rows_finds_its_last_row():
  placed = RowSharded(held=Held.whole(2**31 - 1, 4), model=8, capacity=4, combined=False)
  with jax.enable_x64(True):
    last = jnp.array([8 * (2**31 - 1) - 1, 2**31 - 2, 0, 8 * (2**31 - 1)], jnp.uint64)
  own, unique_M, end_L = jax.jit(placed._bucket, compiler_options=FAST)(last)
  assert own.unique_U[:3].tolist() == [0, 2**31 - 2, 2**31 - 2]
  assert unique_M.tolist() == [2, 1, 0, 3]
  assert end_L.tolist() == [2, 2, 2, 2, 2, 2, 2, 3]


def test_rows_have_keys_of_their_own():
  """Rows 3 and 3 + 2^32 of a stack, with their owners, would share a key of 32 bits."""
  keys = []
  for number in (3, 3 + 2**31, 3 + 2**32, 4):
    held = Held(SHARE, STACK.rows, number // SHARE, 4, 4, 0)
    row_1 = jnp.array([number % SHARE], jnp.int32)
    keys.append(jax.random.key_data(row_keys(jax.random.key(0), held, row_1)).tobytes())
  assert len(set(keys)) == 4
  # Of a row's number, not of its owner.
  other = Held(SHARE // 2, STACK.rows, (3 + 2**32) // (SHARE // 2), 4, 4, 0)
  row_1 = jnp.array([(3 + 2**32) % (SHARE // 2)], jnp.int32)
  same = jax.random.key_data(row_keys(jax.random.key(0), other, row_1)).tobytes()
  assert same == keys[2]


def test_the_whole_state_has_its_shape_and_a_step_fits_it():
  mesh = meshes.make_mesh(1, L)
  wrap = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
  init = wrap(TABLES.init, in_specs=ONE, out_specs=TABLES.specs())
  stacks = jax.eval_shape(init, jax.random.key(0))
  assert stacks[STACK.name].rows_RW.shape == (STACK.rows, 4)
  assert stacks[STACK.name].slots["v"].shape == (STACK.rows,)
  assert STACK.rows - ROWS - 100 in range(768)

  def step(stacks, batch, key):
    plans = TABLES.plan(batch)
    rows = TABLES.lookup(stacks, plans)
    return TABLES.update(stacks, plans, rows, jnp.float32(0.1), key), rows

  sharded = wrap(step, in_specs=(TABLES.specs(), ALL, ONE), out_specs=(TABLES.specs(), ALL))
  new, rows = jax.eval_shape(sharded, stacks, batch(), jax.random.key(0))
  assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, stacks)
  assert rows[STACK.name].shape == (B * 2 + 3 * B, 4)
