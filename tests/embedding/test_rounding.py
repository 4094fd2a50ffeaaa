"""Narrow weights: both neighbours of a number, without bias, judged by all values of the format."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gemjax.embedding.rounding import quantize, row_scales

KEY = jax.random.key(7)
# All finite values of the format, from its 256 codes.
CODES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
VALUES = np.unique(CODES[np.isfinite(CODES)])


def neighbours(y):
  """(below, above): the values of the format around `y`, itself twice where it is one."""
  below = VALUES[np.searchsorted(VALUES, y, side="right") - 1]
  above = VALUES[np.searchsorted(VALUES, y, side="left")]
  return below, above


@pytest.mark.parametrize(
  "y", [1.03, -1.03, 300.0, 447.9, 0.0171, 0.0157, 0.003, -0.0004, 1e-9, 15.99, 2.0**-6]
)
def test_float8_is_one_of_both_neighbours_and_exact_in_the_mean(y):
  draws = 200_000
  x_UW = jnp.full((1, draws), y, jnp.float32)
  noise_UW = jax.random.bits(KEY, x_UW.shape, jnp.uint32)
  found = np.asarray(quantize(x_UW, jnp.ones(1), noise_UW)).astype(np.float64)
  exact = float(np.float32(y))
  below, above = neighbours(exact)
  assert set(np.unique(found)) <= {below, above}
  share = (exact - below) / (above - below) if above > below else 0.0
  sigma = (above - below) * np.sqrt(share * (1 - share) / draws)
  assert abs(found.mean() - exact) <= 5 * sigma + 1e-7 * abs(exact)
  nearest = np.asarray(quantize(x_UW[:, :1], jnp.ones(1), None)).astype(np.float64)[0, 0]
  assert abs(nearest - exact) == min(exact - below, above - exact)


def test_what_the_format_has_keeps_its_bits():
  scales_U = 2.0 ** np.array([-140, -20, 0, 5], np.float32)[1:]
  x_UW = (scales_U[:, None] * VALUES).astype(np.float32)
  np.testing.assert_array_equal(row_scales(jnp.asarray(x_UW)), scales_U)
  noise_UW = jax.random.bits(KEY, x_UW.shape, jnp.uint32)
  found = np.asarray(quantize(jnp.asarray(x_UW), jnp.asarray(scales_U), noise_UW))
  np.testing.assert_array_equal(found.astype(np.float64), np.tile(VALUES, (3, 1)))


def test_the_scale_is_the_smallest_power_of_two_that_reaches():
  rng = np.random.default_rng(0)
  x_UW = (rng.normal(size=(500, 8)) * 10.0 ** rng.uniform(-30, 30, (500, 1))).astype(np.float32)
  scales_U = np.asarray(row_scales(jnp.asarray(x_UW)), np.float64)
  assert (np.log2(scales_U) % 1 == 0).all()
  most_U = np.abs(x_UW.astype(np.float64)).max(1) / scales_U
  assert (most_U <= 448).all() and (most_U > 224).all()


def test_rows_of_zeros_and_rows_that_are_not_finite():
  x_UW = jnp.array([[0.0, 0.0], [np.nan, 1.0], [np.inf, 2.0], [1e-40, 0.0]])
  scales_U = row_scales(x_UW)
  np.testing.assert_array_equal(scales_U, np.ones(4))
  noise_UW = jnp.full(x_UW.shape, 2**32 - 1, jnp.uint32)
  found = np.asarray(quantize(x_UW, scales_U, noise_UW)).astype(np.float32)
  np.testing.assert_array_equal(found[0], [0, 0])
  np.testing.assert_array_equal(found[3], [0, 0])
  assert np.isnan(found[1:3, 0]).all() and (found[1:3, 1] == [1, 2]).all()
