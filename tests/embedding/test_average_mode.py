"""Average mode: groups that train on their own examples, and the mean of what they learnt."""

import copy

import examples
import jax
import meshes
import numpy as np
import pytest
from dense import assert_rounded_without_bias, bfloat16_errors
from examples import KINDS, LAYOUT, B

from gemjax.embedding import stack as stack_lib

MESHES = {(8, 1): ("rowwise", "sgd"), (4, 2): ("adagrad", "half"), (2, 3): ("rowwise", "adam")}
PARAMS = [pytest.param(m, marks=pytest.mark.slow) if m == (4, 2) else m for m in MESHES]
SQUARED = ("rowwise", "adagrad", "half")  # Whose sum of squares is corrected.


@pytest.fixture(scope="module", params=PARAMS, ids=lambda m: f"{m[0]}x{m[1]}")
def run(request):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stack_lib, "CHUNK", 500)  # So that averaging goes over tables in several parts.
    yield meshes.Run(*request.param, MESHES[request.param], replicas="average")


def groups(run, stacks, rule):
  """Group -> table -> DenseTable that goes on from the group's copy."""
  config, accumulated = run.tables[rule].config, run.data if rule in SQUARED else 1
  return [
    examples.dense_tables(run.copy(stacks[rule], d), config, accumulated=accumulated)
    for d in range(run.data)
  ]


def test_groups_train_alone_and_average_makes_them_one(run):
  stacks, per = run.born(), B // run.data
  dense = {rule: groups(run, stacks, rule) for rule in run.tables}
  trained, averaged = [], []
  for t, kind in enumerate(KINDS):
    coef_BND = examples.make_coef(t)
    stacks, units, _ = run.step(stacks, kind, t, coef_BND)
    for d in range(run.data):
      own = range(d * per, (d + 1) * per)
      grads = examples.gradients(kind, t, coef_BND, own)
      for rule in run.tables:
        seen, expected = units[rule][own.start : own.stop], examples.units(kind, t, dense[rule][d])
        np.testing.assert_allclose(seen, expected[own.start : own.stop], rtol=1e-4, atol=2e-5)
        for table, (grad_RW, touched_R) in grads.items():
          dense[rule][d][table].step(run.data * grad_RW, touched_R, float(meshes.rate(t)))
    for rule in run.tables:
      now = groups(run, stacks, rule)
      for d in range(run.data):
        trained += compare(rule, now[d], dense[rule][d])
        if rule == "half":  # One step at a time: roundings differ from copy to copy.
          dense[rule][d] = now[d]
    if t % 3 == 2:
      before = {rule: groups(run, stacks, rule) for rule in run.tables}
      stacks = run.average(stacks, jax.random.key(100 + t))
      meshes.assert_copies_agree(stacks)
      for rule in run.tables:
        now = groups(run, stacks, rule)[0]
        averaged += compare(rule, now, means(before[rule]))
        if rule == "half":
          dense[rule] = groups(run, stacks, rule)
        else:
          dense[rule] = [means(dense[rule]) for _ in range(run.data)]
  if "half" in run.tables:
    assert_rounded_without_bias(np.concatenate(trained))
    assert_rounded_without_bias(np.concatenate(averaged))


def means(of_group):
  """Table -> DenseTable that holds the mean of all groups."""
  out = {}
  for table, first in of_group[0].items():
    out[table] = copy.copy(first)
    for name in ("w", *first.slots()):
      setattr(out[table], name, np.mean([getattr(g[table], name) for g in of_group], 0))
  return out


def compare(rule, tables, expected):
  """All rows and slots are as expected; yields the errors of rounding where there are some."""
  for table, dense in tables.items():
    for name, x in expected[table].slots().items():
      np.testing.assert_allclose(getattr(dense, name), x, rtol=1e-4, atol=1e-6)
    if rule != "half":
      np.testing.assert_allclose(dense.w, expected[table].w, rtol=1e-4, atol=3e-5)
    elif np.any(dense.w != expected[table].w):
      errors = bfloat16_errors(dense.w, expected[table].w)
      yield errors[np.abs(errors) > 1e-4]  # Not of what the step left alone.


def test_a_rule_is_the_exact_one_where_groups_see_the_same_examples(run):
  """With gradients of the same examples in every group v does not grow D times too fast: the
  corrected step of AdaGrad is then that of sqrt(D) times the rate, by the formula of the mode; for
  the other rules, average mode is exact mode. Float32 rounds otherwise: 1e-4.
  """
  stacks = run.born()
  root = np.sqrt(run.data)
  tables = {}
  for rule in set(run.tables) - {"half"}:
    tables[rule] = examples.dense_tables(run.copy(stacks[rule], 0), run.tables[rule].config)
    for dense in tables[rule].values():
      dense.decay /= root if rule in SQUARED else 1
      dense.eps *= root if rule in SQUARED else 1
  for t, kind in enumerate(KINDS[:3]):
    coef_BND = np.tile(examples.make_coef(t)[: B // run.data], (run.data, 1, 1))
    stacks, units, _ = run.step(stacks, kind, t, coef_BND, repeat=run.data)
    meshes.assert_copies_agree(stacks)
    grads = examples.gradients(kind, t, coef_BND, repeat=run.data)
    for rule in tables:
      expected = examples.units(kind, t, tables[rule], repeat=run.data)
      np.testing.assert_allclose(units[rule], expected, rtol=1e-4, atol=2e-5)
      lr = float(meshes.rate(t)) * (root if rule in SQUARED else 1)
      for table, (grad_RW, touched_R) in grads.items():
        tables[rule][table].step(grad_RW, touched_R, lr)
  after = run.average(stacks, jax.random.key(0))
  for rule in tables:
    now = groups(run, after, rule)[0]
    for table, dense in now.items():
      np.testing.assert_allclose(dense.w, tables[rule][table].w, rtol=1e-4, atol=3e-5)
      stack = LAYOUT.positions(table)[0].name
      assert after[rule][stack].clock is None or np.all(
        np.asarray(after[rule][stack].marks_R) == np.asarray(after[rule][stack].clock[0])
      )
