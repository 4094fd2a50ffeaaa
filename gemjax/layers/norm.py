"""Layer norm along any axis, its backward pass keeping only what it needs; frozen batch norm."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from gemjax.layers.kept import made_again
from gemjax.layers.linear import on_cpu_inner_first
from pallas_kernels.once import computed_once

EPS = 1e-6


class LayerNorm(nnx.Module):
  """(x - mean) / sqrt(var + eps) * scale + bias along `axis`; moments in float32, born as 1 and 0.

  Source: Ba et al. 2016, arXiv 1607.06450.
  """

  def __init__(self, width: int, dtype: str, rngs: nnx.Rngs, axis: int = -1, eps: float = EPS):
    rngs.params(), rngs.params()  # As nnx.LayerNorm: weights drawn later keep their values.
    self.scale = nnx.Param(jnp.ones((width,)), axes=("width",))
    self.bias = nnx.Param(jnp.zeros((width,)), axes=("width",))
    self.dtype, self.axis, self.eps = dtype, axis, eps

  @jax.named_scope("norm")
  def __call__(self, x: jax.Array, outer: int = 0) -> jax.Array:
    """With `outer` the axis lies (k outer) on a CPU where scale and bias lie (outer k)."""
    scale, bias = (on_cpu_inner_first(w[...], outer) for w in (self.scale, self.bias))
    return _normalise(self.axis, self.dtype, self.eps, x, scale, bias)


def normalised(x: jax.Array, dtype: str, eps: float = EPS) -> jax.Array:
  """(x - mean) / sqrt(var + eps) along the last axis: a layer norm without parameters."""
  width = x.shape[-1]
  return _normalise(-1, dtype, eps, x, jnp.ones((width,)), jnp.zeros((width,)))


class FrozenBatchNorm(nnx.Module):
  """(x - mean) / sqrt(variance + eps) * scale + bias, (B, W), of statistics that never change.

  Mean and variance come from a checkpoint in which batch norm was trained, and get no gradient;
  born as 0 and 1. Examples do not see each other, so that every mesh computes the same.

  Source: batch norm at inference (Ioffe and Szegedy 2015, arXiv 1502.03167, algorithm 2).
  """

  def __init__(self, width: int, dtype: str, eps: float = EPS):
    born = lambda value: nnx.Param(jnp.full((width,), value, "float32"), axes=("width",))
    self.scale, self.bias, self.mean, self.variance = born(1.0), born(0.0), born(0.0), born(1.0)
    self.dtype, self.eps = dtype, eps

  def __call__(self, x_BW: jax.Array) -> jax.Array:
    mean_W, variance_W = jax.lax.stop_gradient((self.mean[...], self.variance[...]))
    gain_W = jax.lax.rsqrt(variance_W + self.eps) * self.scale[...]
    return ((x_BW.astype(jnp.float32) - mean_W) * gain_W + self.bias[...]).astype(self.dtype)


# As JAX differentiates the formula, XLA writes 1 / sqrt(var) * scale out in the shape of x.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _normalise(axis, dtype, eps, x, scale, bias):
  return _forward(axis, dtype, eps, x, scale, bias)[0]


def _forward(axis, dtype, eps, x, scale, bias):
  x = written_once(x)
  wide = x.astype(jnp.float32)
  mean = written_once(_mean(axis, wide), kept=True)
  # Not mean(x^2) - mean^2, of which nothing is left where x is large and nearly constant.
  inverse = jax.lax.rsqrt(_variance(axis, wide, mean) + eps)
  inverse = written_once(inverse, kept=True)

  def output(x, mean, inverse, scale, bias):
    normal = (x.astype(jnp.float32) - mean) * inverse
    y = normal * _along(axis, scale, x) + _along(axis, bias, x)
    return written_once(y.astype(dtype))

  return made_again(output, centred=True)(x, mean, inverse, scale, bias), (x, mean, inverse, scale)


def _backward(axis, dtype, eps, kept, gradient):
  """dx = (g - mean(g) - n mean(g n)) / sqrt(var + eps), g = dy * scale, n the normalised x."""
  x, mean, inverse, scale = kept
  normal = (x.astype(jnp.float32) - mean) * inverse
  gradient = gradient.astype(jnp.float32)
  g = gradient * _along(axis, scale, x)
  product = written_once(gradient * normal)

  def reduced():
    return g.mean(axis, keepdims=True), (g * normal).mean(axis, keepdims=True)

  def multiplied():  # XLA for CPUs would write g out before it sums.
    return _scaled_mean(axis, gradient, scale), _scaled_mean(axis, product, scale)

  means = jax.lax.platform_dependent(cpu=multiplied, default=reduced)

  def gradient_of_x(x, mean, inverse, scale, gradient, of_mean, of_scale):
    normal = (x.astype(jnp.float32) - mean) * inverse
    g = gradient * _along(axis, scale, x)
    return ((g - of_mean - normal * of_scale) * inverse).astype(x.dtype)

  of_x = computed_once(gradient_of_x)(*kept, gradient, *map(written_once, means))
  others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
  return of_x, product.sum(others), gradient.sum(others)


_normalise.defvjp(_forward, _backward)


def _last(axis: int, x: jax.Array) -> bool:
  return axis % x.ndim == x.ndim - 1


def _mean(axis: int, x: jax.Array) -> jax.Array:
  """Kept as an axis of size 1; XLA for CPUs sums short rows number by number, but for a product."""
  reduced = lambda x: x.mean(axis, keepdims=True)
  if not _last(axis, x):
    return reduced(x)
  width = x.shape[-1]
  # Divided behind the product, as a mean is: exact of a constant of few bits.
  multiplied = lambda x: x @ jnp.ones((width, 1), x.dtype) / width
  return jax.lax.platform_dependent(x, cpu=multiplied, default=reduced)


def _variance(axis: int, x: jax.Array, mean: jax.Array) -> jax.Array:
  """Around `mean`, an axis of size 1 as it; of longer strides XLA for CPUs writes no x - mean."""
  if _last(axis, x):
    return _mean(axis, jnp.square(x - mean))
  around = lambda x, mean: jnp.square(x - mean).mean(axis, keepdims=True)
  return computed_once(around)(x, mean)


def _scaled_mean(axis: int, x: jax.Array, scale: jax.Array) -> jax.Array:
  """The mean of x * scale along `axis`, kept as an axis of size 1, as a product."""
  if _last(axis, x):
    return x @ jnp.expand_dims(scale / x.shape[axis], 1)
  axis %= x.ndim
  lead = tuple(range(axis))
  scale = jnp.broadcast_to(scale / x.shape[axis], x.shape[: axis + 1])
  return jnp.expand_dims(jax.lax.dot_general(scale, x, (((axis,), (axis,)), (lead, lead))), axis)


def written_once(x: jax.Array, *, kept: bool = False) -> jax.Array:
  """x itself, which XLA for CPUs shall neither fold into the products that read it nor lay out
  otherwise; a barrier, which it takes out again before it fuses. With `kept` XLA for GPUs shall
  not compute it anew where the backward pass reads it.
  """
  held = lambda x: jax.lax.optimization_barrier(
    with_layout_constraint(x, Layout(tuple(range(x.ndim))))  # Else a transpose happens behind it.
  )
  other = jax.lax.optimization_barrier if kept else lambda x: x
  return jax.lax.platform_dependent(x, cpu=held, default=other)


def _along(axis: int, vector: jax.Array, x: jax.Array) -> jax.Array:
  """`vector` with axes of size 1, so that it broadcasts along `axis` of x."""
  return jnp.expand_dims(vector, tuple(i for i in range(x.ndim) if i != axis % x.ndim))
