"""Shapes: any array as L matrices of M rows and K columns, and the scales that go with them."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.quantize_fp8.form import BLOCK

Granularity = Literal["tensor", "row", "block"]
GRANULARITIES = ("tensor", "row", "block")


def as_matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
  """(L, M, K): the last two axes and all before them; a vector is one row."""
  *lead, rows, columns = (1, 1, *shape)[-max(len(shape), 2) :]
  return math.prod(lead), rows, columns


def scale_shape(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
  """One scale in all, one a row, or one a block of 32 x 32 (fewer at the edges)."""
  if granularity == "tensor":
    return ()
  if granularity == "row":
    return shape[:-1]
  return (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))


def granularity_of(shape: tuple[int, ...], scales: tuple[int, ...]) -> Granularity | None:
  """The granularity whose scales are of this shape; None where there is none."""
  fits = lambda g: (g != "block" or len(shape) >= 2) and scale_shape(shape, g) == scales
  return next((g for g in GRANULARITIES if fits(g)), None)


def spread(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Scales, one an element or broadcastable to that."""
  granularity = granularity_of(shape, scales.shape)
  if granularity == "tensor":
    return scales
  if granularity == "row":
    return scales[..., None]
  scales = jnp.repeat(jnp.repeat(scales, BLOCK, axis=-2), BLOCK, axis=-1)
  return scales[..., : shape[-2], : shape[-1]]


def largest_of(size: jax.Array, granularity: Granularity) -> jax.Array:
  """The largest of every group, of the shape of the scales."""
  if granularity == "tensor":
    return jnp.max(size)
  if granularity == "row":
    return jnp.max(size, axis=-1)
  *lead, rows, columns = size.shape
  room = [(0, 0)] * len(lead) + [(0, -rows % BLOCK), (0, -columns % BLOCK)]
  size = jnp.pad(size, room)
  size = jnp.max(size.reshape(*size.shape[:-1], -1, BLOCK), axis=-1)
  return jnp.max(size.reshape(*lead, -1, BLOCK, size.shape[-1]), axis=-2)


def places(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  """(row, column) of every element for its noise: rows count through all matrices."""
  *_, columns = (1, *shape)
  iota = lambda axis: jax.lax.broadcasted_iota(
    jnp.int32, (math.prod(shape) // columns, columns), axis
  )
  return iota(0).reshape(shape), iota(1).reshape(shape)
