"""Rows read by index: kept to the bit, and nothing where there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import take_rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("width", [1, 16, 32, 64, 65, 128])
def test_rows_keep_their_bits_and_padding_reads_zeros(dtype, width):
  """Widths on both sides of where LLVM unrolls a copy."""
  rng = np.random.default_rng(width)
  x_RW = np.array(jnp.asarray(rng.standard_normal((40, width)), dtype))
  x_RW[::7], x_RW[::5, 0] = -0.0, np.inf
  row_M = rng.integers(-3, 43, 500).astype(np.int32)
  row_M[:4] = -(2**31), 2**31 - 1, -1, 40
  found_M = (row_M >= 0) & (row_M < 40)
  expected_MW = np.zeros((500, width), x_RW.dtype)
  expected_MW[found_M] = x_RW[row_M[found_M]]
  y_MW = np.asarray(jax.jit(take_rows)(x_RW, row_M))
  assert y_MW.tobytes() == expected_MW.tobytes()


def test_a_row_that_is_not_a_number_is_read_where_it_is_asked_for_and_nowhere_else():
  """Row 0 is what an index without a row would read."""
  x_RW = jnp.zeros((3, 64)).at[0].set(jnp.nan)
  y_MW = np.asarray(jax.jit(take_rows)(x_RW, jnp.array([0, 3, -1, 1, 0])))
  np.testing.assert_array_equal(np.isnan(y_MW).all(1), [True, False, False, False, True])
  np.testing.assert_array_equal(y_MW[1:4], 0)
