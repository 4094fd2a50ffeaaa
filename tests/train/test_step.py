"""The training step against a dense oracle, and what it promises about memory and reporting."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gemjax import config as c
from gemjax.embedding import assemble
from gemjax.embedding.lookup import positions
from gemjax.features import UNLABELLED, Batch, Dense, FeatureSet, Jagged, Sequence, Sparse
from gemjax.train.flops import matmul_flops
from gemjax.train.losses import binary_cross_entropy
from gemjax.train.optimizer import dense_optimizer, schedule
from gemjax.train.programs import Programs
from gemjax.train.state import NEVER, init_state, make_trainer
from gemjax.train.step import plan_step, predict_step, train_step

B = 16


def features(rows=40):
  return FeatureSet(
    dense=(Dense(name="x"),),
    sparse=(Sparse(name="a", size=rows, table="a"), Sparse(name="b", size=7, table="b")),
    sequence=(Sequence(name="h", size=rows, table="a", max_length=4),),
    tasks=("click", "buy"),
  )


def batch(seed=0, rows=40):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(0, 4, B).astype(np.int32)
  values = np.zeros(64, np.int32)
  values[: lengths.sum()] = rng.integers(0, rows, lengths.sum())
  return Batch(
    dense_BF=rng.normal(size=(B, 1)).astype(np.float32),
    ids_BS=np.stack([rng.integers(0, rows, B), rng.integers(0, 7, B)], 1).astype(np.int32),
    label_BT=rng.integers(0, 2, (B, 2)).astype(np.float32),
    weight_B=np.ones(B, np.float32),
    group_B=np.zeros(B, np.int32),
    oracle_BT=np.zeros((B, 0), np.float32),
    sequences={"h": Jagged(values, lengths)},
  )


def trainer(optimizer="sgd", rows=40, **embedding):
  embedding = {"dim": 4, "learning_rate": 0.1, "init_scale": 0.5} | embedding
  config = c.Config(
    name="x",
    embedding=c.Embedding(optimizer=optimizer, **embedding),
    model=c.Wukong(layers=2, fmb_units=2, lcb_units=2, rank=2, mlp=(5,), head=(5,)),
    train=c.Train(task_weights={"buy": 0.5}),
  )
  return make_trainer(config, features(rows), steps=100)


def step_of(t):
  """(state, batch) -> (state, loss), the batch planned on its own."""

  def step(state, b):
    state, _, report = train_step(t, state, plan_step(t, b), b, b)
    return state, report.loss

  return step


def dense_loss(t, params, tables, b):
  """Of whole tables, which autodiff can take a gradient of."""
  at = {name: i.astype(jnp.int32) for name, i in positions(t.tables.layout, b).items()}
  rows = {name: jnp.pad(tables[name], ((0, 1), (0, 0)))[i] for name, i in at.items()}
  units, small, _ = assemble(t.tables.layout, rows, b)
  logits = nnx.merge(t.graph, params)(units, small, b.dense_BF)
  return binary_cross_entropy(logits, b.label_BT, b.weight_B, jnp.array([1.0, 0.5]), B)


def test_a_step_equals_dense_training_of_whole_tables():
  """Gradients by autodiff through full tables, plain SGD on them, Adam on the rest."""
  t = trainer("sgd", weight_decay=0.2)
  state = init_state(t, 0)
  params, opt_state = state.params, state.opt_state
  tables = {w: s.rows_RW for w, s in state.stacks.items()}
  step = jax.jit(step_of(t))
  oracle = jax.value_and_grad(functools.partial(dense_loss, t), argnums=(0, 1))

  @jax.jit
  def dense_step(params, opt_state, tables, b):
    loss, (dp, dt) = oracle(params, tables, b)
    updates, opt_state = t.optimizer.update(dp, opt_state, params)
    tables = {w: (1 - 0.1 * 0.2) * tables[w] - 0.1 * dt[w] for w in tables}
    return optax.apply_updates(params, updates), opt_state, tables, loss

  for i in range(12):
    b = batch(i)
    state, loss = step(state, b)
    params, opt_state, tables, expected = dense_step(params, opt_state, tables, b)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
  for name, s in state.stacks.items():
    missed_R = s.clock[0] - s.marks_R
    read = s.rows_RW * jnp.exp(-missed_R)[:, None]
    np.testing.assert_allclose(read, tables[name], rtol=1e-4, atol=1e-6)
  # Adam divides by gradients that may be nearly zero, so that 1e-7 becomes visible.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-5), state.params, params
  )


def test_an_unlabelled_example_teaches_its_task_nothing():
  """Loss and gradient of logits by the definition, in float64; task 0 of half of the examples."""
  b = batch()
  label = np.where(np.arange(B)[:, None] % 2 == [0, 2], UNLABELLED, b.label_BT)
  logits = np.random.default_rng(1).normal(size=(B, 2))
  weight = np.array([1.0, 0.5])
  loss = lambda x: binary_cross_entropy(x, label.astype(np.float32), b.weight_B, weight, B)
  got, grad = jax.value_and_grad(loss)(jnp.array(logits, jnp.float32))
  p = 1 / (1 + np.exp(-logits))
  share = np.where(label == UNLABELLED, 0, weight / B)
  known = np.where(label == UNLABELLED, 0, label)
  entropy = -(known * np.log(p) + (1 - known) * np.log(1 - p))
  np.testing.assert_allclose(got, (share * entropy).sum(), rtol=1e-6)
  np.testing.assert_allclose(grad, share * (p - known), rtol=1e-5, atol=1e-8)
  assert (np.asarray(grad)[::2, 0] == 0).all() and (label[:, 1] != UNLABELLED).all()


def test_a_step_in_bfloat16_is_near_that_in_float32():
  """Rows and gradients are narrow between tables and model, sums over duplicates are not."""
  exact = trainer("sgd", lookup="ahead")
  narrow = dataclasses.replace(exact.config.train, dtype="bfloat16")
  config = dataclasses.replace(exact.config, train=narrow)
  tables = {}
  for t in (exact, make_trainer(config, features(), steps=100)):
    programs, b = Programs(t), batch()
    state = programs.born()
    ahead, born = programs.ahead(state, b), jax.device_get(state.stacks)
    for _ in range(2):
      state, ahead, _ = programs.step(state, ahead, b, b)
    dtypes = {x.dtype for x in (*ahead.rows.values(), *ahead.owed.grads.values())}
    assert dtypes == {jnp.dtype(t.config.train.dtype)}
    state = programs.settle(state, ahead)
    tables[t.config.train.dtype] = {n: s.rows_RW - born[n].rows_RW for n, s in state.stacks.items()}
  for name, moved in tables["float32"].items():
    error = jnp.linalg.norm(tables["bfloat16"][name] - moved) / jnp.linalg.norm(moved)
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize(
  "optimizer", ["rowwise_adagrad", "lazy_adam", pytest.param("sgd", marks=pytest.mark.slow)]
)
def test_training_fits_a_batch(optimizer):
  t = trainer(optimizer, learning_rate=0.02)
  state, b = init_state(t, 0), batch()
  step = jax.jit(step_of(t), donate_argnums=0)
  losses = []
  for _ in range(300):
    state, loss = step(state, b)
    losses.append(float(loss))
  assert losses[-1] < 0.3 * losses[0]


def test_the_order_of_examples_does_not_matter():
  t, b = trainer(), batch()
  state = init_state(t, 0)
  order = np.random.default_rng(0).permutation(B)
  starts = np.concatenate([[0], np.cumsum(b.sequences["h"].lengths_B)])
  events = [b.sequences["h"].values_E[starts[i] : starts[i + 1]] for i in order]
  values = np.zeros(64, np.int32)
  values[: starts[-1]] = np.concatenate(events)
  plain = {n: x[order] for n, x in b._asdict().items() if n not in ("sequences", "histories")}
  sequences = {"h": Jagged(values, b.sequences["h"].lengths_B[order])}
  shuffled = Batch(**plain, sequences=sequences)
  predict = jax.jit(functools.partial(predict_step, t))
  logits = predict(state, b)
  np.testing.assert_allclose(predict(state, shuffled), logits[order], rtol=1e-4, atol=1e-5)


def test_padding_rows_change_nothing():
  t, b = trainer(), batch()
  state = init_state(t, 0)
  padded = b._replace(weight_B=np.concatenate([np.ones(8), np.zeros(8)]).astype(np.float32))
  poisoned = padded._replace(label_BT=np.where(np.arange(B)[:, None] < 8, b.label_BT, 1.0))
  step = jax.jit(step_of(t))
  _, a = step(state, padded)
  _, z = step(state, poisoned)
  np.testing.assert_array_equal(a, z)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd", "lazy_adam"])
def test_the_compiled_step_has_no_temporary_of_a_tables_size(optimizer, decay):
  rows = 1_000_003
  t = trainer(optimizer, rows, weight_decay=decay)
  state = jax.eval_shape(functools.partial(init_state, t, 0))
  step = jax.jit(step_of(t), donate_argnums=0)
  memory = step.lower(state, batch(rows=rows)).compile().memory_analysis()
  stacks = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.stacks))
  assert memory.alias_size_in_bytes >= stacks
  assert memory.temp_size_in_bytes < rows  # Not even a byte a row.


def test_the_first_part_that_is_not_finite_is_remembered():
  t = trainer()
  state = init_state(t, 0)
  step = jax.jit(step_of(t))
  state, _ = step(state, batch())
  assert all(int(s) == NEVER for s in state.bad_step.values())
  bad = batch()._replace(dense_BF=np.full((B, 1), np.inf, np.float32))
  state, _ = step(state, bad)
  state, _ = step(state, batch())
  first = {part: int(s) for part, s in state.bad_step.items()}
  assert first["loss"] == 1
  assert {"gradient of inputs.dense", "gradient of model.heads"} < set(first)


def test_schedules_follow_their_formulas():
  share = schedule(c.Optimizer(warmup=0.1, schedule="linear"), 100)
  np.testing.assert_allclose([share(0), share(9)], [0.1, 1.0], rtol=1e-6)
  np.testing.assert_allclose([share(10), share(55), share(100)], [1, 0.5, 0], atol=1e-6)
  share = schedule(c.Optimizer(schedule="cosine"), 100)
  np.testing.assert_allclose(share(25), (1 + np.cos(np.pi / 4)) / 2, rtol=1e-6)
  share = schedule(c.Optimizer(warmup=1.0), 4)
  np.testing.assert_allclose([share(i) for i in range(4)], [0.25, 0.5, 0.75, 1.0])


def test_l2_moves_kernels_only():
  optimizer = dense_optimizer(c.Optimizer(l2=1.0, learning_rate=0.1), 10)
  params = {"a": {"kernel": jnp.ones(3), "bias": jnp.ones(3), "scale": jnp.ones(3)}}
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zero, optimizer.init(params), params)
  assert np.all(updates["a"]["kernel"] < 0)
  assert not np.any(updates["a"]["bias"]) and not np.any(updates["a"]["scale"])


def test_flops_are_counted_by_hand_also_inside_loops():
  a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
  assert matmul_flops(lambda a, b: a @ b, a, b) == 2 * 3 * 4 * 5
  square = jnp.ones((4, 4))
  loop = lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]
  assert matmul_flops(jax.jit(loop), a, square) == 7 * 2 * 3 * 4 * 4
