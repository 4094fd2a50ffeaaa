"""Biases of every distance and of logarithms, of all implementations, against dense attention."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import IMPLEMENTATIONS, QUICKLY

from pallas_kernels import LinearBuckets, LogBuckets, RelativeBias, jagged_attention

OFFSETS = np.array([0, 70, 70, 75], np.int32)
E, H, D, WIDTH = 80, 2, 16, 0.301


@pytest.fixture(scope="module")
def case():
  """(q, k, v, tables, coordinates): places, and times whose differences span 1 to 2^30."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((3, E, H, D)).astype(np.float32)
  tables = [rng.standard_normal((H, n)).astype(np.float32) for n in (60, 80)]
  time = np.sort(np.exp(rng.uniform(0, 20, E)).astype(np.int32))
  return *x, tables, (np.arange(E, dtype=np.int32), time)


def dense(q, k, v, tables, coordinates):
  """sum over e <= t of SiLU(q.k + biases) v, example after example."""
  out = jnp.zeros_like(q)
  for a, b in itertools.pairwise(OFFSETS):
    place, time = (np.abs(x[a:b, None] - x[None, a:b]).astype(np.float64) for x in coordinates)
    linear = np.minimum(place, tables[0].shape[1] - 1).astype(int)
    log = np.floor(np.log(np.maximum(time, 1)) / WIDTH).astype(int)
    score = jnp.einsum("thd,ehd->hte", q[a:b], k[a:b])
    score += tables[0][:, linear] + tables[1][:, np.minimum(log, tables[1].shape[1] - 1)]
    weight = jnp.where(np.tri(b - a, dtype=bool), jax.nn.silu(score), 0)
    out = out.at[a:b].set(jnp.einsum("hte,ehd->thd", weight, v[a:b]))
  return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients(case, implementation):
  q, k, v, tables, coordinates = case
  kinds = LinearBuckets(), LogBuckets(WIDTH)

  def jagged(q, k, v, tables):
    biases = [RelativeBias(t, x, x, kind) for t, x, kind in zip(tables, coordinates, kinds)]
    return jagged_attention(
      q, k, v, OFFSETS, activation="silu", causal=True, biases=biases,
      implementation=implementation,
    )  # fmt: skip

  def value_and_gradients(fn):
    def both(q, k, v, tables):
      out, pull = jax.vjp(fn, q, k, v, tables)
      return out, pull(jnp.cos(jnp.arange(out.size)).reshape(out.shape))

    return jax.jit(both, compiler_options=QUICKLY)(q, k, v, tables)

  found = jax.tree.leaves(value_and_gradients(jagged))
  wanted = jax.tree.leaves(value_and_gradients(lambda *args: dense(*args, coordinates)))
  for one, other in zip(found, wanted, strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max())


def test_ends_of_int32():
  distance = jnp.array([-(2**31), 2**31 - 1, -1, 0, 3], jnp.int32)
  assert [*map(int, LinearBuckets()(distance, 3))] == [2, 2, 1, 0, 2]
  assert [*map(int, LogBuckets(WIDTH)(distance, 129))] == [71, 71, 0, 0, 3]
  for table, kind, message in (
    (np.ones((H, 0), np.float32), LinearBuckets(), "at least one column"),
    (np.ones((H, 4), np.int32), LogBuckets(), "must be of floats"),
    (np.ones((H, 4), np.float32), LogBuckets(0.0), "width must be positive"),
  ):
    with pytest.raises(ValueError, match=message):
      kind.check("bias", table)
