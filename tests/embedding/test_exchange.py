"""The capacity of the exchange: it changes the rounds, and not one bit of the result."""

import examples
import hypothesis
import hypothesis.strategies as st
import jax
import meshes
import numpy as np
import pytest
from examples import KINDS, LAYOUT
from meshes import ALL, FAST

from gemjax.embedding import ShardedTables

DATA, MODEL = 2, 4


def trajectory(capacity):
  """(stacks after every step, units of every step, rounds): sums here depend on their order."""
  run = meshes.Run(DATA, MODEL, ("half adam",), capacity)
  stacks, states, units, rounds = run.born(), [], [], []
  for t, kind in enumerate(KINDS):
    stacks, seen, taken = run.step(stacks, kind, t, examples.make_coef(t, exact=False))
    meshes.assert_copies_agree(stacks, f"{kind}: ")
    states.append(meshes.numpy(stacks))
    units.append(np.asarray(seen["half adam"]))
    rounds.append(np.asarray(taken))
  return states, units, rounds


@pytest.fixture(scope="module")
def roomy():
  return trajectory(0)


@pytest.mark.parametrize("capacity", [1, 7])
def test_the_result_does_not_depend_on_the_capacity(roomy, capacity):
  states, units, rounds = trajectory(capacity)
  for t, kind in enumerate(KINDS):
    jax.tree.map(np.testing.assert_array_equal, states[t], roomy[0][t])
    np.testing.assert_array_equal(units[t], roomy[1][t])
    wanted = examples.wanted(kind, t, DATA * MODEL, MODEL)
    expected = max(examples.rounds(w, capacity) for w in wanted.values())
    np.testing.assert_array_equal(rounds[t], np.full(DATA * MODEL, expected))
    np.testing.assert_array_equal(roomy[2][t], np.ones(DATA * MODEL))
  most = max(int(r.max()) for r in rounds)
  assert most > 10 if capacity == 1 else most > 1


def test_buckets_are_counted_and_a_capacity_of_them_takes_one_round():
  run = meshes.Run(DATA, MODEL, ("sgd",))
  tables = run.tables["sgd"]
  sizes = jax.jit(run.on_devices(tables.bucket_sizes, (ALL,), ALL), compiler_options=FAST)
  for t, kind in enumerate(KINDS):
    wanted = examples.wanted(kind, t, DATA * MODEL, MODEL)
    seen = sizes(examples.make_batch(kind, t, DATA * MODEL))
    assert set(seen) == set(wanted) == {s.name for s in LAYOUT.stacks if s.placement == "row"}
    for name, of_device in wanted.items():
      expected = [[len(rows) for rows in device] for device in of_device]
      np.testing.assert_array_equal(np.reshape(seen[name], (DATA * MODEL, MODEL)), expected)
      room = tables.with_capacity({name: int(np.max(expected))}).capacity[name]
      assert examples.rounds(of_device, room) == 1


@hypothesis.given(st.integers(0, 2**31))
def test_a_capacity_leaves_a_margin_and_little_more(largest):
  tables = ShardedTables(layout=LAYOUT, config=examples.embedding(), data=1, model=2)
  capacity = tables.with_capacity({"row4": largest}).capacity["row4"]
  wished = 17 / 16 * largest + 2 * largest**0.5 + 1
  assert wished <= capacity <= max(wished + 1, wished * 17 / 16)
  # One of few values: five leading bits, so that other ids meet the same compiled program.
  low = capacity & -capacity
  assert capacity // low < 32


def test_a_capacity_is_configured_or_measured():
  config = examples.embedding(exchange_rows=5)
  assert ShardedTables.on_mesh(LAYOUT, config, 1, 2).measured
  tables = ShardedTables.on_mesh(LAYOUT, examples.embedding(), 1, 2)
  assert not tables.measured
  assert not tables.with_capacity({"row4": 3}).measured
  assert tables.with_capacity({"row4": 3, "row8": 3}).measured
  assert ShardedTables.on_mesh(LAYOUT, examples.embedding(), 8, 1).measured  # Nothing to exchange.
