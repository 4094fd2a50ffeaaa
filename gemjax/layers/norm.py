"""Layer norm along any axis, with a backward pass that keeps only what it needs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

EPS = 1e-6


class LayerNorm(nnx.Module):
  """(x - mean) / sqrt(var + 1e-6) * scale + bias along `axis`; moments in float32, born as 1 and 0.

  Source: Ba et al. 2016, arXiv 1607.06450.
  """

  def __init__(self, width: int, dtype: str, rngs: nnx.Rngs, axis: int = -1):
    rngs.params(), rngs.params()  # As nnx.LayerNorm: weights drawn later keep their values.
    self.scale = nnx.Param(jnp.ones((width,)), axes=("width",))
    self.bias = nnx.Param(jnp.zeros((width,)), axes=("width",))
    self.dtype, self.axis = dtype, axis

  def __call__(self, x: jax.Array) -> jax.Array:
    return _normalise(self.axis, self.dtype, x, self.scale[...], self.bias[...])


# As JAX differentiates the formula, XLA writes 1 / sqrt(var) * scale out in the shape of x.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalise(axis, dtype, x, scale, bias):
  return _forward(axis, dtype, x, scale, bias)[0]


def _forward(axis, dtype, x, scale, bias):
  wide = x.astype(jnp.float32)
  mean = wide.mean(axis, keepdims=True)
  # Not mean(x^2) - mean^2, of which nothing is left where x is large and nearly constant.
  inverse = jax.lax.rsqrt(jnp.square(wide - mean).mean(axis, keepdims=True) + EPS)
  y = (wide - mean) * inverse * _along(axis, scale, x) + _along(axis, bias, x)
  return y.astype(dtype), (x, mean, inverse, scale)


def _backward(axis, dtype, kept, gradient):
  """dx = (g - mean(g) - n mean(g n)) / sqrt(var + eps), g = dy * scale, n the normalised x."""
  x, mean, inverse, scale = kept
  normal = (x.astype(jnp.float32) - mean) * inverse
  gradient = gradient.astype(jnp.float32)
  g = gradient * _along(axis, scale, x)
  of_mean = g.mean(axis, keepdims=True)
  of_scale = (g * normal).mean(axis, keepdims=True)
  others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
  of_x = ((g - of_mean - normal * of_scale) * inverse).astype(x.dtype)
  return of_x, (gradient * normal).sum(others), gradient.sum(others)


_normalise.defvjp(_forward, _backward)


def _along(axis: int, vector: jax.Array, x: jax.Array) -> jax.Array:
  """`vector` with axes of size 1, so that it broadcasts along `axis` of x."""
  return jnp.expand_dims(vector, tuple(i for i in range(x.ndim) if i != axis % x.ndim))
