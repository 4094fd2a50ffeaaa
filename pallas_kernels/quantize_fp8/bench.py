"""Quantisation beside what one would write in jnp: a quotient and astype."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import timing
from pallas_kernels.quantize_fp8 import layout, shapes, triton
from pallas_kernels.quantize_fp8.api import OP

# Operations of integers and floats an element, counted in form.py and noise.py.
ROUNDING, NOISE = 26, 13


def rows(quick: bool) -> Iterator[dict]:
  """A row for every named shape."""
  for name, shape in shapes.SHAPES.items():
    if quick:
      shape = dataclasses.replace(shape, x=(64, shape.x[1]))
    baseline = "jnp: x / (max |x| / largest), astype to nearest"
    if shape.stochastic:
      baseline = "jnp: the same on noise of jax.random.uniform added to x, of an ulp"
    yield {"op": OP, "shape": name, "baseline": baseline} | work(shape) | times(shape)


def work(shape: shapes.Shape) -> dict[str, float]:
  """What it needs, and what the kernel visits."""
  elements = math.prod(shape.x)
  scales = math.prod(layout.scale_shape(shape.x, shape.granularity))
  count, m, k = layout.as_matrices(shape.x)
  tile = triton.tile_of((count, m, k), shape.granularity)
  tiles = count * pl.cdiv(m, tile[0]) * pl.cdiv(k, tile[1])
  visited = tiles * tile[0] * tile[1]
  operations = ROUNDING + NOISE * shape.stochastic
  return {
    "flops_needed": elements * operations,
    # One scale for all: a pass for the largest before the pass that rounds.
    "bytes_needed": elements * (jnp.dtype(shape.of).itemsize * (1 + (scales == 1)) + 1)
    + 4 * scales,
    "flops_visited": visited * operations,
    "tiles_visited": tiles,
    "useful_tile_share": elements / visited,
  }


def times(shape: shapes.Shape) -> dict[str, float]:
  """Milliseconds side by side."""
  x = np.random.default_rng(0).standard_normal(shape.x, np.float32)
  x = jnp.asarray(x, shape.of)
  ours = lambda name: functools.partial(jax.jit(functools.partial(shapes.quantize, shape, name)), x)
  theirs = jax.jit(functools.partial(_plain, shape))
  return timing.beside(ours, lambda: theirs(x))


def _plain(shape: shapes.Shape, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  info = jnp.finfo(shape.dtype)
  x = x.astype(jnp.float32)
  scales = layout.largest_of(jnp.abs(x), shape.granularity) / float(info.max)
  y = x / layout.spread(scales, x.shape)
  if shape.stochastic:
    _, exponent = jnp.frexp(y)
    ulp = jnp.ldexp(1.0, jnp.maximum(exponent - 1, int(info.minexp)) - info.nmant)
    y = y + ulp * (jax.random.uniform(jax.random.key(0), x.shape) - 0.5)
  return y.astype(shape.dtype), scales
