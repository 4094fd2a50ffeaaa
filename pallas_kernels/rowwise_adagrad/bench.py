"""The row-wise update beside a dense one: work of the batch against work of the vocabulary."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import run_tiles, timing
from pallas_kernels.rowwise_adagrad.api import rowwise_adagrad_update
from pallas_kernels.rowwise_adagrad.runs import sorted_runs
from pallas_kernels.rowwise_adagrad.shapes import SHAPES, Shape

LR, EPS = 0.05, 1e-8
BASELINE = "dense gradient of the table's shape, AdaGrad over all rows; ours sorts the ids, too"


def rows(quick: bool) -> Iterator[dict]:
  """A row for every named shape."""
  for name, shape in SHAPES.items():
    if quick:
      shape = dataclasses.replace(shape, rows=20_000, gradients=2_000)
    yield (
      {"op": "rowwise_adagrad", "shape": name, "baseline": BASELINE} | work(shape) | times(shape)
    )


def work(shape: Shape) -> dict[str, float]:
  """What the update needs, and what the kernel visits."""
  gradients, width = shape.gradients, shape.width
  touched = len(np.unique(shape.draw()))
  # A sum over the runs; square and its sum, product, difference for each row.
  flops = (gradients - touched) * width + 4 * touched * width
  row_bytes = 2 * (width * jnp.dtype(shape.dtype).itemsize + 4)
  tiles = [-(-entries // run_tiles.TILE) for entries in run_tiles.level_entries(gradients)]
  visited = sum(tiles) * run_tiles.TILE
  return {
    "flops_needed": flops,
    "bytes_needed": gradients * (4 * width + 8) + touched * (row_bytes + 4),
    "flops_visited": flops * visited / gradients,
    "tiles_visited": sum(tiles),
    "useful_tile_share": gradients / visited,
  }


def times(shape: Shape) -> dict[str, float]:
  """Milliseconds side by side."""
  rng = np.random.default_rng(0)
  row_N = jnp.asarray(shape.draw())
  grad_NW = jnp.asarray(rng.standard_normal((shape.gradients, shape.width), np.float32))

  def sparse(implementation, table_RW, v_R, grad_NW, row_N):
    runs = sorted_runs(row_N, shape.rows)
    options = {"lr": LR, "eps": EPS, "implementation": implementation}
    return rowwise_adagrad_update(table_RW, v_R, grad_NW, *runs, **options)

  def dense(table_RW, v_R, grad_NW, row_N):
    grad_RW = jnp.zeros(table_RW.shape, jnp.float32).at[row_N].add(grad_NW)
    v_R = v_R + jnp.mean(jnp.square(grad_RW), axis=1)
    step_RW = LR * grad_RW / (jnp.sqrt(v_R)[:, None] + EPS)
    return (table_RW - step_RW).astype(table_RW.dtype), v_R

  step = lambda update: _stepper(update, shape, grad_NW, row_N)
  return timing.beside(lambda name: step(functools.partial(sparse, name)), step(dense))


def _stepper(update, shape: Shape, *batch):
  """A function that takes one more step in place."""
  update = jax.jit(update, donate_argnums=(0, 1))
  state = [jnp.zeros((shape.rows, shape.width), shape.dtype), jnp.zeros((shape.rows,))]

  def step():
    state[:] = update(*state, *batch)
    return state

  return step
