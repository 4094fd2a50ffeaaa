"""What arrives is the nearest number of the type that travels; nothing is made wider to travel."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gemjax.embedding.rounding import quantize, row_scales
from gemjax.embedding.travel import moved

E4M3 = ml_dtypes.float8_e4m3fn


def rows():
  rng = np.random.default_rng(0)
  x_NW = rng.normal(size=(400, 24)) * 2.0 ** rng.integers(-30, 30, (400, 1))
  x_NW[0], x_NW[1, 0], x_NW[2] = 0, 448 * 2.0**9, 2.0**-20
  return x_NW.astype(np.float32)


def travel(x_NW, dtype):
  """(what arrives, the types that travelled)"""
  seen = []

  def move(x_NX):
    seen.append(x_NX.dtype.name)
    return x_NX[::-1]

  return np.asarray(moved(jnp.asarray(x_NW), dtype, move)[::-1], np.float32), seen


def test_float8_has_a_power_of_two_a_row():
  x_NW = rows()
  found_NW, seen = travel(x_NW, "float8_e4m3fn")
  assert seen == ["uint8", "float32"]
  for found_W, x_W in zip(found_NW, x_NW):
    exponents = [k for k in range(-140, 140) if float(np.abs(x_W).max()) <= 448 * 2.0**k]
    scale = 2.0 ** exponents[0] if x_W.any() else 1.0
    nearest_W = (x_W.astype(np.float64) / scale).astype(E4M3).astype(np.float64) * scale
    np.testing.assert_array_equal(found_W, nearest_W)


def test_rows_of_float8_tables_pass_unchanged():
  x_NW = jnp.asarray(rows())
  scales_N = row_scales(x_NW)
  bits_NW = jax.random.bits(jax.random.key(0), x_NW.shape, jnp.uint32)
  stored_NW = np.asarray(quantize(x_NW, scales_N, bits_NW), np.float32) * scales_N[:, None]
  # But for those that rounding lifted into the next octave, whose least bits go.
  kept_N = np.abs(stored_NW).max(1) <= 448 * np.asarray(scales_N)
  assert kept_N.mean() > 0.9
  found_NW, _ = travel(stored_NW, "float8_e4m3fn")
  np.testing.assert_array_equal(found_NW[kept_N], stored_NW[kept_N])


@pytest.mark.parametrize(
  ("dtype", "travels", "seen"),
  [
    ("float32", "bfloat16", "bfloat16"),
    ("float32", "float32", "float32"),
    ("bfloat16", "float32", "bfloat16"),
  ],
)
def test_the_narrower_type_travels(dtype, travels, seen):
  x_NW = rows().astype(dtype)
  found_NW, types = travel(x_NW, travels)
  assert types == [seen]
  np.testing.assert_array_equal(found_NW, x_NW.astype(seen).astype(np.float32))
