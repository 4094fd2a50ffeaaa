"""Rows that are looked up ahead: one update old, and no copy of their table.

As a program it prints as JSON the bytes of temporaries of such a step on H100s that are not here,
for two sizes of the tables.
"""

import functools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import test_step
from jax.sharding import NamedSharding

from gemjax import config as c
from gemjax.parallel.arrays import BATCH
from gemjax.plan import target
from gemjax.plan.compile import compile_for
from gemjax.train.state import init_state, make_trainer
from gemjax.train.step import look_up_step, plan_step, settle_step, train_step


def test_gradients_are_those_of_tables_one_update_ago():
  """Autodiff through full tables as they were before the last update, plain SGD on the new ones."""
  t = test_step.trainer("sgd", lookup="ahead")
  state = init_state(t, 0)
  params, opt_state = state.params, state.opt_state
  old = tables = {w: s.rows_RW for w, s in state.stacks.items()}
  oracle = functools.partial(test_step.dense_loss, t)
  oracle = jax.jit(jax.value_and_grad(oracle, argnums=(0, 1)))
  step, update = jax.jit(functools.partial(train_step, t)), jax.jit(t.optimizer.update)
  look_up = lambda state, b: look_up_step(t, state, plan_step(t, b))
  ahead = jax.jit(look_up)(state, test_step.batch(0))
  apart = 0.0
  for i in range(12):
    batch = test_step.batch(i)
    state, ahead, report = step(state, ahead, batch, test_step.batch(i + 1))
    expected, (dense_grad, table_grad) = oracle(params, old, batch)
    np.testing.assert_allclose(report.loss, expected, rtol=1e-5)
    apart = max(apart, abs(float(oracle(params, tables, batch)[0] / expected) - 1))
    updates, opt_state = update(dense_grad, opt_state, params)
    params = optax.apply_updates(params, updates)
    old, tables = tables, {w: tables[w] - 0.1 * table_grad[w] for w in tables}
  assert apart > 3e-4  # Of the newest tables the loss is another one.
  state = jax.jit(functools.partial(settle_step, t))(state, ahead.owed)
  for name, stack in state.stacks.items():
    np.testing.assert_allclose(stack.rows_RW, tables[name], rtol=1e-4, atol=1e-6)


def test_the_upcoming_plan_is_made_before_the_forward_pass():
  """A barrier joins it to the rows that the model reads, where they are looked up ahead alone."""

  def joined(lookup):
    t = test_step.trainer("sgd", lookup=lookup)
    batch, state = test_step.batch(0), t.abstract()
    ahead = jax.eval_shape(functools.partial(plan_step, t), batch)
    rows = None
    if lookup == "ahead":
      ahead = jax.eval_shape(functools.partial(look_up_step, t), state, ahead)
      rows = sorted(x.shape for x in jax.tree.leaves(ahead.rows))
    plans = sorted(x.shape for x in jax.tree.leaves(ahead.plans))
    program = jax.make_jaxpr(functools.partial(train_step, t))(state, ahead, batch, batch)
    found = []
    for eqn in _equations(program.jaxpr):
      if eqn.primitive.name == "optimization_barrier":
        shapes = {kind: sorted(v.aval.shape for v in eqn.invars if v.aval.dtype.kind == kind)
                  for kind in "if"}  # fmt: skip
        found.append((shapes["i"], shapes["f"]))
    return found.count((plans, rows))

  assert (joined("ahead"), joined("exact")) == (1, 0)


def _equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jax.core.jaxprs_in_params(eqn.params):
      yield from _equations(inner)


def test_tables_are_updated_in_place():
  sizes = []
  for rows in (100_000, 200_000):
    t = test_step.trainer("lazy_adam", rows, lookup="ahead", l2=0.1)
    batch, state = test_step.batch(0, rows), t.abstract()
    ahead = jax.eval_shape(functools.partial(plan_step, t), batch)
    ahead = jax.eval_shape(functools.partial(look_up_step, t), state, ahead)
    step = jax.jit(functools.partial(train_step, t), donate_argnums=0)
    compiled = step.lower(state, ahead, batch, batch).compile()
    sizes.append(compiled.memory_analysis().temp_size_in_bytes)
  assert sizes[0] == sizes[1]


@pytest.mark.skipif(not target.has_cuda_wheels(), reason="compiling for GPUs needs jax[cuda12]")
@pytest.mark.slow
def test_tables_are_updated_in_place_on_gpus():
  here = pathlib.Path(__file__)
  paths = ":".join(map(str, (here.parents[2], here.parent)))
  done = subprocess.run(
    [sys.executable, here], capture_output=True, text=True, check=False,
    env=target.environment() | {"PYTHONPATH": paths},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  small, large = json.loads(done.stdout)
  assert abs(large - small) < 100_000


def main():
  topology = target.parse_topology("h100:1x4")
  mesh = jax.sharding.Mesh(target.devices(topology).reshape(2, 2), (c.DATA, c.MODEL))
  placed = lambda tree: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, BATCH)), tree
  )
  sizes = []
  for rows in (1_000_000, 2_000_000):
    one = test_step.trainer("lazy_adam", rows, lookup="ahead", l2=0.1, dtype="bfloat16")
    t = make_trainer(one.config, test_step.features(rows), 100, mesh)
    batch, state = placed(test_step.batch(0, rows)), t.abstract()
    ahead = jax.eval_shape(functools.partial(plan_step, t), batch)
    ahead = placed(jax.eval_shape(functools.partial(look_up_step, t), state, ahead))
    step = jax.jit(
      functools.partial(train_step, t),
      donate_argnums=0,
      out_shardings=(t.shardings, None, None),
    )
    sizes.append(compile_for(step, (state, ahead, batch, batch)).memory.temporaries)
  print(json.dumps(sizes))


if __name__ == "__main__":
  main()
