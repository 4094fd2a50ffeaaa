"""The sums of runs beside summands brought into order first, then summed by XLA."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import timing
from pallas_kernels.rowwise_adagrad.runs import sorted_runs
from pallas_kernels.rowwise_adagrad.shapes import Shape
from pallas_kernels.run_tiles import TILE, level_entries
from pallas_kernels.sum_runs.api import sum_runs
from pallas_kernels.sum_runs.shapes import SHAPES

BASELINE = "a sorted copy, then jax.ops.segment_sum"


def rows(quick: bool) -> Iterator[dict]:
  """A row for every named shape."""
  for name, shape in SHAPES.items():
    if quick:
      shape = dataclasses.replace(shape, rows=20_000, gradients=2_000)
    yield {"op": "sum_runs", "shape": name, "baseline": BASELINE} | work(shape) | times(shape)


def work(shape: Shape) -> dict[str, float]:
  """What the sums need, and what the kernel visits."""
  touched, entries = len(np.unique(shape.draw())), level_entries(shape.gradients)
  flops = (shape.gradients - touched) * shape.width
  tiles = [-(-count // TILE) for count in entries]
  visited = sum(tiles) * TILE
  summand = shape.width * jnp.dtype(shape.dtype).itemsize
  return {
    "flops_needed": flops,
    # Each summand, its place and its run; sums have room for as many.
    "bytes_needed": shape.gradients * (summand + 8 + 4 * shape.width),
    "flops_visited": flops * visited / shape.gradients,
    "tiles_visited": sum(tiles),
    "useful_tile_share": shape.gradients / visited,
  }


def times(shape: Shape) -> dict[str, float]:
  """Milliseconds side by side."""
  rng = np.random.default_rng(0)
  x_NW = jnp.asarray(rng.standard_normal((shape.gradients, shape.width), np.float32), shape.dtype)
  order_N, segment_N, _ = jax.jit(functools.partial(sorted_runs, rows=shape.rows))(
    jnp.asarray(shape.draw())
  )
  count = shape.gradients

  def ours(name):
    fn = jax.jit(functools.partial(sum_runs, count=count, implementation=name))
    return lambda: fn(x_NW, order_N, segment_N)

  @jax.jit
  def theirs(x_NW, order_N, segment_N):
    sorted_NW = x_NW[order_N].astype(jnp.float32)
    return jax.ops.segment_sum(sorted_NW, segment_N, count, indices_are_sorted=True)

  return timing.beside(ours, lambda: theirs(x_NW, order_N, segment_N))
