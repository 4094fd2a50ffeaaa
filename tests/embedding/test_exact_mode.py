"""Exact mode on every mesh: what whole tables in float64 do, whatever the ids and the placement."""

import functools

import examples
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from dense import assert_rounded_without_bias, bfloat16_errors
from examples import KINDS, LAYOUT

# (data, model) -> rules, and a capacity that makes some batches take several rounds.
MESHES = {
  (8, 1): (("adagrad", "half"), 0),
  (4, 2): (("rowwise", "half"), 20),
  (2, 4): (("rowwise", "adagrad", "adam", "sgd", "half"), 0),
  (1, 8): (("half",), 3),
  (1, 3): (("half",), 0),
  (2, 3): (("adam", "half"), 7),
}
STEPS = [(kind, t) for t, kind in enumerate(2 * KINDS)]


class Trajectory:
  """Two steps of every kind of batch, one after the other, and all that was seen of them."""

  def __init__(self, data, model, rules, capacity):
    self.run = meshes.Run(data, model, rules, capacity)
    stacks = self.run.born()
    self.states, self.units, self.rounds = [meshes.numpy(stacks)], [], []
    for kind, t in STEPS:
      stacks, units, rounds = self.run.step(stacks, kind, t, examples.make_coef(t))
      meshes.assert_copies_agree(stacks, f"{kind}, step {t}: ")
      self.states.append(meshes.numpy(stacks))
      self.units.append(meshes.numpy(units))
      self.rounds.append(np.asarray(rounds))
    self.stacks = stacks


SLOW = [(4, 2), (1, 8), (1, 3), (2, 3)]
PARAMS = [pytest.param(m, marks=pytest.mark.slow) if m in SLOW else m for m in MESHES]


@pytest.fixture(scope="module", params=PARAMS, ids=lambda m: f"{m[0]}x{m[1]}")
def mesh(request):
  return Trajectory(*request.param, *MESHES[request.param])


@pytest.fixture(scope="module")
def one():
  """A single device."""
  return Trajectory(1, 1, ("half",), 0)


@functools.cache
def gradients(kind, t):
  return examples.gradients(kind, t, examples.make_coef(t))


@functools.cache
def oracle(rule):
  """(units of every step, table -> w after every step), from where all meshes start."""
  run = meshes.Run(1, 1, (rule,))
  tables = examples.dense_tables(meshes.numpy(run.born())[rule], run.tables[rule].config)
  units, rows = [], []
  for kind, t in STEPS:
    units.append(examples.units(kind, t, tables))
    for table, (grad_RW, touched_R) in gradients(kind, t).items():
      tables[table].step(grad_RW, touched_R, float(meshes.rate(t)))
    rows.append({name: table.w.copy() for name, table in tables.items()})
  return units, rows


def test_units_and_tables_are_those_of_whole_tables(mesh):
  for rule in set(mesh.run.tables) - {"half"}:
    units, rows = oracle(rule)
    for kind, t in STEPS:
      where = f"{rule}, {kind}, step {t}"
      np.testing.assert_allclose(mesh.units[t][rule], units[t], rtol=1e-4, atol=2e-5, err_msg=where)
      now = examples.dense_tables(mesh.states[t + 1][rule], mesh.run.tables[rule].config)
      for table, dense in now.items():
        np.testing.assert_allclose(dense.w, rows[t][table], rtol=1e-4, atol=2e-5, err_msg=where)


def test_rows_that_no_example_names_keep_their_bits(mesh):
  for kind, t in STEPS:
    for table, (_, touched_R) in gradients(kind, t).items():
      name = LAYOUT.positions(table)[0].name
      rest = examples.place(table, np.flatnonzero(~touched_R))
      for rule in mesh.run.tables:
        old, new = (mesh.states[t + i][rule][name] for i in range(2))
        np.testing.assert_array_equal(old.rows_RW[rest], new.rows_RW[rest])
        for slot in old.slots:
          np.testing.assert_array_equal(old.slots[slot][rest], new.slots[slot][rest])


def test_all_devices_take_the_rounds_that_the_ids_ask_for(mesh):
  run = mesh.run
  for kind, t in STEPS:
    expected = 0
    if run.model > 1:
      wanted = examples.wanted(kind, t, run.devices, run.model)
      expected = max(examples.rounds(w, run.capacity) for w in wanted.values())
      largest = max(len(rows) for w in wanted.values() for device in w for rows in device)
      assert (expected == 1) == (largest <= run.capacity)
    np.testing.assert_array_equal(mesh.rounds[t], np.full(run.devices, expected))


def test_bfloat16_rows_are_neighbours_of_the_exact_step_and_without_bias(mesh):
  """One exact step from every state: what is stored is the bfloat16 below or above it."""
  errors = []
  for kind, t in STEPS:
    tables = examples.dense_tables(mesh.states[t]["half"], mesh.run.tables["half"].config)
    units_BND = examples.units(kind, t, tables)
    np.testing.assert_allclose(mesh.units[t]["half"], units_BND, rtol=1e-5, atol=1e-6)
    for table, (grad_RW, touched_R) in gradients(kind, t).items():
      stack = mesh.states[t + 1]["half"][LAYOUT.positions(table)[0].name]
      at = examples.place(table, np.flatnonzero(touched_R))
      tables[table].step(grad_RW, touched_R, float(meshes.rate(t)))
      errors.append(bfloat16_errors(stack.rows_RW[at], tables[table].w[touched_R]))
      np.testing.assert_allclose(stack.slots["v"][at], tables[table].v[touched_R], rtol=1e-6)
  assert_rounded_without_bias(np.concatenate(errors))


def test_bfloat16_tables_have_the_bits_of_one_device(mesh, one):
  """Gradients here sum to the same bits in any order; the mean over split columns does not."""
  for name, stack in mesh.states[-1]["half"].items():
    expected = one.states[-1]["half"][name]
    assert stack.rows_RW.dtype == jnp.bfloat16
    differ = (stack.rows_RW != expected.rows_RW).mean()
    assert differ == 0 if not name.startswith("column") else differ < 0.01
    np.testing.assert_allclose(stack.slots["v"], expected.slots["v"], rtol=1e-6)


def test_opposite_gradients_of_two_devices_cancel_before_they_are_squared(mesh):
  coef_BND = np.zeros_like(examples.make_coef(0))
  sparse = [slice(*examples.UNITS[f.name]) for f in examples.FEATURES.sparse]
  for cut in sparse:
    coef_BND[0, cut], coef_BND[-1, cut] = 1, -1
  stacks, _, _ = mesh.run.step(mesh.stacks, "equal", 0, coef_BND)
  for rule in set(mesh.run.tables) - {"adam"}:  # Its v fades.
    for name, stack in meshes.numpy(stacks[rule]).items():
      jax.tree.map(np.testing.assert_array_equal, stack.slots, mesh.states[-1][rule][name].slots)
