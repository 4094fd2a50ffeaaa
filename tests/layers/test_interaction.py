"""Maps over units: values and gradients do not depend on the groups summed side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemjax.layers.interaction import GROUPS, map_units

D, N, L = 3, 5, 2


@pytest.mark.parametrize("batch", [1, 7, GROUPS, 3 * GROUPS // 2, 2 * GROUPS])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 3e-2)])
def test_every_batch_size(batch, dtype, tolerance):
  rng = np.random.default_rng(batch)
  x, w, g = (rng.normal(size=s) for s in ((batch, D, N), (N, L), (batch, D, L)))
  if dtype == "bfloat16":
    x, g = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, g))
  map_of = lambda x, w: map_units(x, w, N, dtype)
  y, transpose = jax.vjp(map_of, jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32))
  of_x, of_w = transpose(jnp.asarray(g, dtype))
  assert y.dtype == of_x.dtype == dtype and of_w.dtype == jnp.float32
  expected = (np.einsum("bdn,nl->bdl", x, w), np.einsum("bdl,nl->bdn", g, w),
              np.einsum("bdn,bdl->nl", x, g))  # fmt: skip
  for found, right in zip((y, of_x, of_w), expected):
    np.testing.assert_allclose(np.float64(found), right, rtol=0, atol=tolerance * abs(right).max())
