"""Products of 8-bit floats against products of the rounded numbers in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gemjax.layers.linear import contract


def power_of_two(largest, top):
  return 2.0 ** np.ceil(np.log2(largest / top))


def rounded(x, format):
  """By ml_dtypes, with the scale from its definition."""
  x = np.asarray(x, np.float64)
  scale = power_of_two(np.abs(x).max(), float(ml_dtypes.finfo(format).max))
  return (x / scale).astype(format).astype(np.float64) * scale


@pytest.fixture
def operands():
  key = jax.random.split(jax.random.key(0), 3)
  shapes = ((48, 64), (64, 32), (48, 32))
  return [jax.random.normal(k, s) * f for k, s, f in zip(key, shapes, (3.0, 0.1, 1e-3))]


def test_forward_and_backward_are_those_of_rounded_numbers(operands):
  x, w, g = operands
  y, pullback = jax.vjp(lambda x, w: contract("bi,io->bo", x, w, 64, "float32", float8=True), x, w)
  of_x, of_w = pullback(g)
  x8, w8 = rounded(x, ml_dtypes.float8_e4m3fn), rounded(w, ml_dtypes.float8_e4m3fn)
  g8 = rounded(g, ml_dtypes.float8_e5m2)
  for found, exact in ((y, x8 @ w8), (of_x, g8 @ w8.T), (of_w, x8.T @ g8)):
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max())
  whole = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  assert 0.01 < np.linalg.norm(y - whole) / np.linalg.norm(whole) < 0.06


def test_of_x_its_8_bits_are_kept(operands):
  x, w, _ = operands
  product = lambda x, w: contract("bi,io->bo", x, w, len(w), "float32", float8=True)
  pullback = jax.eval_shape(lambda x, w: jax.vjp(product, x, w)[1], x, w)
  kept = {(str(leaf.dtype), leaf.shape) for leaf in jax.tree.leaves(pullback) if leaf.ndim}
  assert kept == {("float8_e4m3fn", x.shape), ("float32", w.shape)}  # W itself is no copy.


def test_rounding_is_the_only_difference(operands):
  """Numbers that 3 bits of mantissa hold multiply exactly."""
  x = jnp.round(operands[0]).clip(-8, 8)
  w = jnp.sign(operands[1])
  assert (contract("bi,io->bo", x, w, 64, "float32", float8=True) == x @ w).all()
