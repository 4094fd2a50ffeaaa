"""One stack on one device against whole tables in float64: optimisers, shrinking, rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import EPS, DenseTable, summed
from meshes import FAST

from gemjax.embedding.duplicates import find_duplicates, sum_duplicates
from gemjax.embedding.held import Held
from gemjax.embedding.rounding import to_bfloat16
from gemjax.embedding.row_optimizers import ROW_OPTIMIZERS
from gemjax.embedding.stack import StackRule

R, W, M = 50, 4, 32
LR = 0.1
HELD, KEY = Held.whole(R, W), jax.random.key(0)
jit = functools.partial(jax.jit, compiler_options=FAST)


def make(name, decay=0.0, dtype="float32", l2=0.0):
  rule = StackRule(
    optimizer=ROW_OPTIMIZERS[name](EPS), decay=decay, l2=l2, init_scale=1.0, dtype=dtype
  )
  return rule, jit(lambda: rule.init(KEY, HELD))()


@functools.partial(jit, static_argnums=0)
def update(rule, stack, row_M, grad_MW, lr):
  segments = find_duplicates(row_M, R)
  grad_UW = sum_duplicates(segments, grad_MW)
  return rule.write(stack, segments.unique_U, grad_UW, lr, KEY, HELD)


def batches(steps, seed=0):
  """Zipf-skewed rows with duplicates; the last is always padding (row R)."""
  rng = np.random.default_rng(seed)
  for _ in range(steps):
    row_M = np.minimum(rng.zipf(1.3, M) - 1, R - 1).astype(np.int32)
    row_M[-1] = R
    yield row_M, rng.normal(size=(M, W)).astype(np.float32)


@pytest.mark.parametrize(("decay", "l2"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.05)])
@pytest.mark.parametrize("name", sorted(ROW_OPTIMIZERS))
def test_update_equals_the_dense_oracle_under_a_schedule(name, decay, l2):
  rule, stack = make(name, decay, l2=l2)
  oracle = DenseTable(stack.rows_RW, name, decay, l2)
  for t, (row_M, grad_MW) in enumerate(batches(60), 1):
    lr = LR * min(1.0, t / 10) * (0.5 if t > 40 else 1.0)
    stack = update(rule, stack, row_M, grad_MW, np.float32(lr))
    oracle.step(*summed(R, row_M[:-1], grad_MW[:-1]), lr)
    if t % 20 == 0:  # What is read is what a dense optimiser would hold, touched or not.
      read = rule.read(stack, jnp.arange(R))
      np.testing.assert_allclose(read, oracle.w, rtol=2e-5, atol=2e-5)


def test_a_row_that_was_not_looked_up_keeps_its_bits():
  rule, stack = make("rowwise_adagrad", decay=0.3)
  new = update(rule, stack, np.array([3, 7, 3], np.int32), jnp.ones((3, W)), LR)
  others, touched = np.delete(np.arange(R), [3, 7]), np.array([3, 7])
  np.testing.assert_array_equal(new.rows_RW[others], stack.rows_RW[others])
  np.testing.assert_array_equal(new.slots["v"][others], 0)
  assert np.all(new.rows_RW[touched] != stack.rows_RW[touched])


def test_decay_stays_exact_after_a_hundred_thousand_steps():
  """C_t in plain float32 would be off by percents here: it adds 1e-4 to sums near 10."""
  rule, stack = make("sgd", decay=1.0)
  lr, steps = 1e-4, 100_000
  row_1 = jnp.zeros(1, jnp.int32)

  def body(_, stack):
    return rule.write(stack, row_1, jnp.zeros((1, W)), jnp.float32(lr), KEY, HELD)

  before = np.asarray(stack.rows_RW, np.float64)
  stack = jit(lambda s: jax.lax.fori_loop(0, steps, body, s))(stack)
  expected = before * (1 - np.float64(np.float32(lr))) ** steps
  np.testing.assert_allclose(rule.read(stack, jnp.array([5])), expected[5:6], rtol=1e-5)
  # Row 0 was written at every one of those steps, so that its float32 roundings add up.
  np.testing.assert_allclose(rule.read(stack, jnp.array([0])), expected[:1], rtol=1e-3)


def test_the_clock_moves_once_a_step_although_rows_are_written_in_rounds():
  rule, stack = make("adagrad", decay=0.3)
  row_U, grad_UW = jnp.arange(4), jnp.ones((4, W))

  def write(stack, rows, **tick):
    return rule.write(stack, row_U[rows], grad_UW[rows], jnp.float32(LR), KEY, HELD, **tick)

  once = jit(lambda s: write(s, slice(4)))(stack)
  twice = jit(lambda s: write(write(s, slice(2)), slice(2, 4), tick=False))(stack)
  jax.tree.map(np.testing.assert_array_equal, once, twice)


def test_padding_reads_zeros_and_writes_nothing():
  rule, stack = make("adagrad")
  assert not np.any(rule.read(stack, jnp.array([R])))
  new = update(rule, stack, np.full(4, R, np.int32), jnp.full((4, W), jnp.nan), LR)
  np.testing.assert_array_equal(new.rows_RW, stack.rows_RW)


def test_equal_rows_are_summed_and_the_order_of_a_batch_does_not_matter():
  row_M, grad_MW = next(iter(batches(1)))
  for order in (np.arange(M), np.random.default_rng(1).permutation(M)):
    segments = find_duplicates(jnp.asarray(row_M[order]), R)
    sums = np.asarray(sum_duplicates(segments, jnp.asarray(grad_MW[order])))
    real, unique = np.unique(row_M), np.asarray(segments.unique_U)
    np.testing.assert_array_equal(unique[: len(real)], real)
    assert np.all(unique[len(real) :] == R)
    for i, row in zip(real, sums):
      expected = grad_MW[row_M == i].astype(np.float64).sum(0)
      np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_rounded_without_bias():
  x = jnp.full((200_000,), 1 + 1 / 512)  # A quarter of the way between two bfloat16 values.
  noise = jax.random.bits(KEY, x.shape, jnp.uint16)
  rounded = np.asarray(to_bfloat16(x, noise), np.float64)
  assert set(np.unique(rounded)) == {1.0, 1 + 1 / 128}
  assert abs(rounded.mean() - (1 + 1 / 512)) < 5 * (1 / 128) * np.sqrt(3 / 16 / 200_000)
  odd = np.array([np.inf, -np.inf, np.nan], np.float32)
  kept = to_bfloat16(jnp.asarray(odd), noise[:3]).astype(jnp.float32)
  np.testing.assert_array_equal(kept, odd)


def test_bfloat16_tables_follow_the_oracle_in_the_mean():
  """Steps far below the spacing of bfloat16 must not vanish: nearest rounding would stay at w."""
  held = Held.whole(4096, W)
  rule = StackRule(optimizer=ROW_OPTIMIZERS["sgd"](), init_scale=0.0, dtype="bfloat16")
  stack = jit(lambda: rule.init(KEY, held))()
  stack = stack._replace(rows_RW=jnp.ones_like(stack.rows_RW))
  row_U, grad_UW = jnp.arange(4096), jnp.ones((4096, W))
  step = jit(lambda s, key: rule.write(s, row_U, grad_UW, jnp.float32(1e-4), key, held))
  for t in range(20):
    stack = step(stack, jax.random.key(t))
  assert stack.rows_RW.dtype == jnp.bfloat16
  assert abs(float(stack.rows_RW.astype(jnp.float32).mean()) - (1 - 20e-4)) < 2e-4
