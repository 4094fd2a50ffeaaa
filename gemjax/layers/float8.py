"""Matrix products of 8-bit floats with one scale a matrix, found when it is rounded.

    y = (x / s_x)_e4m3 (W / s_w)_e4m3 s_x s_w
    dx = g_e5m2 Wᵀ_e4m3     dW = xᵀ_e4m3 g_e5m2       sums in float32

XLA makes cuBLAS's fp8 products of it on GPUs that have them; elsewhere the rounded numbers are
multiplied as they are. What the backward pass needs of x is kept in its 8 bits.

Source: formats and their roles from Micikevicius et al. 2022, arXiv 2209.05433; scales are powers
of two (`pallas_kernels.quantize_fp8`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import quantize_fp8


class Rounded(NamedTuple):
  """values * scale."""

  values: jax.Array
  scale: jax.Array


def rounded(x: jax.Array, format: jax.typing.DTypeLike = jnp.float8_e4m3fn) -> Rounded:
  """x in 8 bits."""
  return Rounded(*quantize_fp8(x, granularity="tensor", dtype=format))


def product(equation: str, a: Rounded, b: Rounded, dtype: jax.typing.DTypeLike) -> jax.Array:
  """einsum(equation, a, b) in `dtype`; GPUs read the 8 bits themselves."""
  whole = lambda r: r.values.astype(dtype) * r.scale.astype(dtype)
  return jnp.einsum(equation, whole(a), whole(b))


def gradients(
  equation: str, x: Rounded, w: Rounded, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(dx, dW) of `product`, of the gradient's type; every letter stands in two of the three."""
  of_x, rest = equation.split(",")
  of_w, of_y = rest.split("->")
  g = rounded(gradient, jnp.float8_e5m2)
  return (
    product(f"{of_y},{of_w}->{of_x}", g, w, gradient.dtype),
    product(f"{of_x},{of_y}->{of_w}", x, g, gradient.dtype),
  )
