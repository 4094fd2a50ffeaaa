"""Maps over units: values and gradients do not depend on the groups summed side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from gemjax.config import MODEL
from gemjax.layers import interaction
from gemjax.layers.interaction import (
  GROUPS,
  FactorizationMachine,
  map_together,
  map_units,
  units_joined,
)

D, N, L = 3, 5, 2


@pytest.mark.parametrize("batch", [1, 7, GROUPS, 3 * GROUPS // 2, 2 * GROUPS])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 3e-2)])
def test_every_batch_size(batch, dtype, tolerance):
  rng = np.random.default_rng(batch)
  x, w, g = (rng.normal(size=s) for s in ((batch, D, N), (N, L), (batch, D, L)))
  if dtype == "bfloat16":
    x, g = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, g))
  map_of = lambda x, w: map_units(x, (w,), N, dtype)[0]
  y, transpose = jax.vjp(map_of, jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32))
  of_x, of_w = transpose(jnp.asarray(g, dtype))
  assert y.dtype == of_x.dtype == dtype and of_w.dtype == jnp.float32
  expected = (np.einsum("bdn,nl->bdl", x, w), np.einsum("bdl,nl->bdn", g, w),
              np.einsum("bdn,bdl->nl", x, g))  # fmt: skip
  for found, right in zip((y, of_x, of_w), expected):
    np.testing.assert_allclose(np.float64(found), right, rtol=0, atol=tolerance * abs(right).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_have_the_types_of_what_they_are_of(dtype):
  """Units in float32 on their way into a layer that computes in `dtype`."""
  fm = FactorizationMachine("optimised", N, D, 2, dtype=dtype, rngs=nnx.Rngs(0))

  def loss(x_BDN, y_NK):
    (mixed_BDK,) = map_together(x_BDN, [nnx.Param(y_NK)], N, dtype)
    return fm(x_BDN, mixed_BDK).astype("float32").sum()

  x_BDN = jnp.ones((4, D, N))
  of_x, of_y = jax.grad(loss, (0, 1))(x_BDN, fm.y_NK[...])
  assert of_x.dtype == of_y.dtype == "float32"
  # sum_nk x_n (x . y)_k for x = 1: D (sum of Y) N, differentiated.
  np.testing.assert_allclose(of_y, np.full(of_y.shape, 4.0 * D * N), rtol=1e-2)


@pytest.mark.parametrize("large", [1, 10**9])
@pytest.mark.parametrize("rank", [1, 4, interaction.TERMS + 1])
def test_pairs_have_the_gradients_of_their_formula_as_sums_and_as_products(
  monkeypatch, large, rank
):
  monkeypatch.setattr(interaction, "LARGE", large)
  rng = np.random.default_rng(rank)
  fm = FactorizationMachine("optimised", N, D, rank, dtype="float32", rngs=nnx.Rngs(0))
  x_BDN, mixed_BDK = (jnp.asarray(rng.normal(size=(6, D, w)), jnp.float32) for w in (N, rank))
  pairs_BI, transpose = jax.vjp(fm, x_BDN, mixed_BDK)
  g_BI = jnp.asarray(rng.normal(size=pairs_BI.shape), jnp.float32)
  found = pairs_BI, *transpose(g_BI)
  x, mixed, g = (np.float64(a) for a in (x_BDN, mixed_BDK, g_BI.reshape(6, rank, N)))
  expected = (
    np.einsum("bdk,bdn->bkn", mixed, x).reshape(6, -1),
    np.einsum("bdk,bkn->bdn", mixed, g),
    np.einsum("bdn,bkn->bdk", x, g),
  )
  for have, want in zip(found, expected, strict=True):
    np.testing.assert_allclose(have, want, atol=2e-6)


def test_units_beside_each_other_keep_their_values_and_their_gradients():
  rng = np.random.default_rng(0)
  first, second, weight = (rng.normal(size=(4, D, n)).astype(np.float32) for n in (N, L, N + L))
  first[0, 1, 2], second[1, 0, 1] = np.nan, np.inf  # Nothing of one reaches the other.
  joined, transpose = jax.vjp(units_joined, first, second)
  np.testing.assert_array_equal(joined, np.concatenate([first, second], 2))
  for found, right in zip(transpose(weight), (weight[..., :N], weight[..., N:]), strict=True):
    np.testing.assert_array_equal(found, right)


def test_maps_whose_kernels_lie_whole_or_in_shards_are_each_their_own():
  """A small kernel beside one that is large enough to be sharded, and one that is not there.

  The two devices see examples of their own, and a whole kernel's gradient is that of its examples.
  """
  rng = np.random.default_rng(0)
  units, widths = 4, (2, 3, 1)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x_BDN, kernels = draw(6, D, units), [draw(units, w) for w in widths]
  weights = [draw(6, D, w) for w in widths]

  def maps(x_BDN, *kernels):
    first, *others = [nnx.Param(kernel) for kernel in kernels]
    found = map_together(x_BDN, [first, None, *others], units, "float32")
    return [m for m in found if m is not None]

  def gradients(x_BDN, *rest):
    weights, kernels = rest[:3], rest[3:]
    loss = lambda *of: sum(jnp.vdot(w, y) for w, y in zip(weights, maps(*of)))
    of_x, *of_kernels = jax.grad(loss, range(4))(x_BDN, *kernels)
    return of_x, *(of[None] for of in of_kernels)

  mesh = jax.make_mesh((2,), (MODEL,))
  whole, halved = PartitionSpec(), PartitionSpec(MODEL)
  lie = (whole, halved, whole)  # Of the kernels.

  def over_devices(f, ins, *inputs):
    placed = [jax.device_put(a, NamedSharding(mesh, lies)) for a, lies in zip(inputs, ins)]
    return jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=halved, check_vma=False)(*placed)

  found = over_devices(maps, (halved, *lie), x_BDN, *kernels)
  for y_BDL, kernel_NL in zip(found, kernels, strict=True):
    np.testing.assert_allclose(y_BDL, np.float64(x_BDN) @ np.float64(kernel_NL), atol=1e-5)

  given = (halved, *3 * [halved], *lie)
  of_x_BDN, *of_kernels = over_devices(gradients, given, x_BDN, *weights, *kernels)
  expected = sum(np.float64(w) @ np.float64(k).T for w, k in zip(weights, kernels))
  np.testing.assert_allclose(of_x_BDN, expected, atol=1e-5)
  own = lambda half, w: np.einsum("bdn,bdl->nl", *(np.float64(a[half]) for a in (x_BDN, w)))
  first, second = slice(0, 3), slice(3, 6)
  for i in (0, 2):
    each = np.stack([own(first, weights[i]), own(second, weights[i])])
    np.testing.assert_allclose(of_kernels[i], each, atol=1e-5)
  all_NL = own(slice(None), weights[1])  # Summed over the devices, each keeps its rows.
  np.testing.assert_allclose(of_kernels[1], all_NL.reshape(2, 2, 3), atol=1e-5)
