"""LayerNorm against flax's, whose gradients JAX derives, and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemjax.layers.norm import LayerNorm
from pallas_kernels.once import computed_once

X = np.random.default_rng(0).normal(2.0, 3.0, (5, 4, 6)).astype(np.float32)


def ours(axis, dtype="float32"):
  layer = LayerNorm(X.shape[axis], dtype, nnx.Rngs(0), axis=axis)
  rng = np.random.default_rng(1)
  layer.scale[...] = jnp.asarray(rng.normal(size=X.shape[axis]), jnp.float32)
  layer.bias[...] = jnp.asarray(rng.normal(size=X.shape[axis]), jnp.float32)
  return layer


@pytest.mark.parametrize("axis", [-1, -2, 1, 0])
def test_value_and_gradients_are_those_of_flax(axis):
  layer = ours(axis)
  theirs = nnx.LayerNorm(
    X.shape[axis], reduction_axes=axis, feature_axes=axis, use_fast_variance=False, rngs=nnx.Rngs(0)
  )
  theirs.scale[...], theirs.bias[...] = layer.scale[...], layer.bias[...]
  weight = np.random.default_rng(2).normal(size=X.shape)

  def of(module):
    graph, params = nnx.split(module, nnx.Param)
    loss = lambda params, x: (nnx.merge(graph, params)(x) * weight).sum()
    grads = jax.grad(loss, argnums=(0, 1))(params, jnp.asarray(X))
    return module(jnp.asarray(X)), nnx.to_pure_dict(grads[0]), grads[1]

  for mine, other in zip(jax.tree.leaves(of(layer)), jax.tree.leaves(of(theirs)), strict=True):
    np.testing.assert_allclose(mine, other, rtol=2e-4, atol=2e-5)


def test_moments_are_float32_where_the_layer_computes_in_bfloat16():
  layer = ours(-1, "bfloat16")
  wide = X.astype(jnp.bfloat16).astype(np.float64)
  normal = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
  expected = normal * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])
  found = layer(jnp.asarray(X, jnp.bfloat16))
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float64(found), expected, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("axis", [-1, 1])
def test_gradients_of_bfloat16_are_float32_but_for_their_rounding(axis):
  weight = np.random.default_rng(2).normal(size=X.shape)

  def gradients(dtype):
    graph, params = nnx.split(ours(axis, dtype), nnx.Param)
    loss = lambda params, x: (nnx.merge(graph, params)(x).astype(jnp.float32) * weight).sum()
    x = jnp.asarray(X, jnp.bfloat16).astype(dtype)
    return jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(params, x))

  for narrow, wide in zip(gradients("bfloat16"), gradients("float32"), strict=True):
    assert narrow.dtype in (jnp.bfloat16, jnp.float32)
    error = np.abs(np.float64(narrow) - np.float64(wide)).max()
    assert error <= 2**-7 * np.abs(np.float64(wide)).max()


def test_a_constant_is_mapped_to_the_bias():
  layer = ours(-1)
  found = layer(jnp.full((3, 6), 7.0))
  np.testing.assert_allclose(found, np.tile(layer.bias[...], (3, 1)), atol=1e-6)


@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_a_large_mean_costs_no_more_than_the_rounding_of_x(mean):
  layer = ours(-1)
  x = (mean + X / 3).astype(np.float32)
  wide = x.astype(np.float64)
  normal = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
  expected = normal * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])
  np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-6 * mean)


def test_what_is_computed_once_is_not_computed_by_each_that_reads_it():
  """On CPUs, by what XLA makes of it; else the product is joined to both that read it."""

  def products(make):
    def read(x):
      y = make(lambda x: x * 3.0)(x)
      return y[:, :3] + 1.0, y[:, 3:] + 2.0

    text = jax.jit(read).lower(jnp.ones((4, 6))).compile().as_text()
    return sum(" multiply(" in line for line in text.splitlines())

  assert products(lambda f: f) == 2 and products(computed_once) == 1


@pytest.mark.parametrize("platform, held", [("cpu", True), ("cuda", False)])
def test_only_programs_for_cpus_are_told_what_to_compute_once(platform, held):
  layer, x = ours(1), jnp.asarray(X)
  graph, params = nnx.split(layer, nnx.Param)
  loss = lambda params, x: nnx.merge(graph, params)(x).sum()
  traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(params, x)
  assert ("inlineable" in traced.lower(lowering_platforms=(platform,)).as_text()) == held
