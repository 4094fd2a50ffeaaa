"""Lookup and sparse updates against dense float64 oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemjax.embedding.row_optimizers import ROW_OPTIMIZERS
from gemjax.embedding.stack import StackRule, round_stochastically, sum_duplicates

R, W, M = 50, 4, 32
LR, EPS = 0.1, 1e-8


class DenseOracle:
  """The optimisers written again over whole tables, in float64, row by row."""

  def __init__(self, name, rows_RW, decay=0.0, l2=0.0):
    self.name, self.decay, self.l2 = name, decay, l2
    self.w = np.array(rows_RW, np.float64)
    self.v = np.zeros_like(self.w)
    self.m = np.zeros_like(self.w)
    self.n = np.zeros(len(self.w))

  def update(self, ids, grads, lr):
    self.w *= 1 - lr * self.decay  # Every row, at every step.
    self.w *= np.exp(-lr * self.l2 * np.array([self._scale(i) for i in range(R)]))
    total = {}
    for i, g in zip(ids, np.asarray(grads, np.float64)):
      total[int(i)] = total.get(int(i), 0) + g
    for i, g in total.items():
      if i < R:
        self.w[i] -= lr * self._direction(i, g)

  def _scale(self, i):
    v = self.v[i]
    if self.name == "lazy_adam":
      v = v / (1 - 0.999 ** max(1, self.n[i]))
    return np.ones_like(v) if self.name == "sgd" else 1 / (np.sqrt(v) + EPS)

  def _direction(self, i, g):
    if self.name == "sgd":
      return g
    if self.name == "lazy_adam":
      self.n[i] += 1
      self.m[i] = 0.9 * self.m[i] + 0.1 * g
      self.v[i] = 0.999 * self.v[i] + 0.001 * g**2
      m, v = self.m[i] / (1 - 0.9 ** self.n[i]), self.v[i] / (1 - 0.999 ** self.n[i])
      return m / (np.sqrt(v) + EPS)
    self.v[i] += np.mean(g**2) if self.name == "rowwise_adagrad" else g**2
    return g / (np.sqrt(self.v[i]) + EPS)


def make(name, decay=0.0, dtype="float32", l2=0.0):
  rule = StackRule(
    optimizer=ROW_OPTIMIZERS[name](EPS), decay=decay, l2=l2, init_scale=1.0, dtype=dtype
  )
  return rule, rule.init(jax.random.key(0), R, W)


def batches(steps, seed=0):
  """Zipf-skewed ids with duplicates; the last is always padding (id R)."""
  rng = np.random.default_rng(seed)
  for _ in range(steps):
    ids = np.minimum(rng.zipf(1.3, M) - 1, R - 1).astype(np.int32)
    ids[-1] = R
    yield ids, rng.normal(size=(M, W)).astype(np.float32)


@pytest.mark.parametrize(("decay", "l2"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.05)])
@pytest.mark.parametrize("name", sorted(ROW_OPTIMIZERS))
def test_update_equals_the_dense_oracle_under_a_schedule(name, decay, l2):
  rule, stack = make(name, decay, l2=l2)
  oracle = DenseOracle(name, stack.rows_RW, decay, l2)
  update = jax.jit(rule.update)
  for t, (ids, grads) in enumerate(batches(60), 1):
    lr = LR * min(1.0, t / 10) * (0.5 if t > 40 else 1.0)
    stack = update(stack, ids, grads, jnp.float32(lr))
    oracle.update(ids, grads, lr)
    if t % 20 == 0:  # What is read is what a dense optimiser would hold, touched or not.
      read = rule.lookup(stack, jnp.arange(R))
      np.testing.assert_allclose(read, oracle.w, rtol=2e-5, atol=2e-5)


def test_a_row_that_was_not_looked_up_keeps_its_bits():
  rule, stack = make("rowwise_adagrad", decay=0.3)
  new = rule.update(stack, jnp.array([3, 7, 3]), jnp.ones((3, W)), jnp.float32(LR))
  others = [i for i in range(R) if i not in (3, 7)]
  np.testing.assert_array_equal(new.rows_RW[jnp.array(others)], stack.rows_RW[jnp.array(others)])
  np.testing.assert_array_equal(new.slots["v"][jnp.array(others)], 0)
  assert np.all(new.rows_RW[jnp.array([3, 7])] != stack.rows_RW[jnp.array([3, 7])])


def test_decay_stays_exact_after_a_hundred_thousand_steps():
  """C_t in plain float32 would be off by percents here: it adds 1e-4 to sums near -10."""
  rule, stack = make("sgd", decay=1.0)
  lr, steps = 1e-4, 100_000

  def body(_, stack):
    return rule.update(stack, jnp.array([0]), jnp.zeros((1, W)), jnp.float32(lr))

  before = np.asarray(stack.rows_RW, np.float64)
  stack = jax.jit(lambda s: jax.lax.fori_loop(0, steps, body, s))(stack)
  expected = before * (1 - np.float64(np.float32(lr))) ** steps
  np.testing.assert_allclose(rule.lookup(stack, jnp.array([5])), expected[5:6], rtol=1e-5)
  # Row 0 was written at every one of those steps, so that its float32 roundings add up.
  np.testing.assert_allclose(rule.lookup(stack, jnp.array([0])), expected[:1], rtol=1e-3)


def test_padding_reads_zeros_and_writes_nothing():
  rule, stack = make("adagrad")
  assert not np.any(rule.lookup(stack, jnp.array([R])))
  new = rule.update(stack, jnp.full((4,), R), jnp.full((4, W), jnp.nan), jnp.float32(LR))
  np.testing.assert_array_equal(new.rows_RW, stack.rows_RW)


def test_order_of_a_batch_does_not_matter_for_which_rows_are_summed():
  ids, grads = next(iter(batches(1)))
  unique, sums = sum_duplicates(jnp.asarray(ids), jnp.asarray(grads), R)
  real = np.unique(ids)
  np.testing.assert_array_equal(unique[: len(real)], real)
  assert np.all(unique[len(real) :] == R)
  for i, row in zip(real, np.asarray(sums)):
    np.testing.assert_allclose(row, grads[ids == i].astype(np.float64).sum(0), rtol=1e-5, atol=1e-6)


def test_bfloat16_rows_are_rounded_without_bias():
  x = jnp.full((200_000,), 1 + 1 / 512)  # A quarter of the way between two bfloat16 values.
  rounded = np.asarray(round_stochastically(x, jax.random.key(0)), np.float64)
  assert set(np.unique(rounded)) == {1.0, 1 + 1 / 128}
  assert abs(rounded.mean() - (1 + 1 / 512)) < 5 * (1 / 128) * np.sqrt(3 / 16 / 200_000)
  odd = np.array([np.inf, -np.inf, np.nan], np.float32)
  kept = round_stochastically(jnp.asarray(odd), jax.random.key(0)).astype(jnp.float32)
  np.testing.assert_array_equal(kept, odd)


def test_bfloat16_tables_follow_the_oracle_in_the_mean():
  """Steps far below the spacing of bfloat16 must not vanish: nearest rounding would stay at w."""
  rule = StackRule(optimizer=ROW_OPTIMIZERS["sgd"](), init_scale=0.0, dtype="bfloat16")
  stack = rule.init(jax.random.key(0), 4096, W)
  stack = stack._replace(rows_RW=jnp.ones_like(stack.rows_RW))
  ids, grads = jnp.arange(4096), jnp.ones((4096, W))
  update = jax.jit(rule.update)
  for t in range(20):
    stack = update(stack, ids, grads, jnp.float32(1e-4), jax.random.key(t))
  assert stack.rows_RW.dtype == jnp.bfloat16
  assert abs(float(stack.rows_RW.astype(jnp.float32).mean()) - (1 - 20e-4)) < 2e-4


@pytest.mark.parametrize("name", sorted(ROW_OPTIMIZERS))
def test_the_compiled_update_has_no_temporary_of_a_tables_size(name):
  rows = 1_000_003
  rule = StackRule(optimizer=ROW_OPTIMIZERS[name](EPS), decay=0.1)
  stack = jax.eval_shape(functools.partial(rule.init, rows=rows, width=W), jax.random.key(0))
  args = (stack, jax.ShapeDtypeStruct((M,), jnp.int32), jax.ShapeDtypeStruct((M, W), jnp.float32))
  scalar = jax.ShapeDtypeStruct((), jnp.float32)
  compiled = jax.jit(rule.update, donate_argnums=0).lower(*args, scalar).compile()
  memory = compiled.memory_analysis()
  table = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stack))
  assert memory.alias_size_in_bytes >= table - 8  # Overwritten in place.
  assert memory.temp_size_in_bytes < 100_000 < rows
