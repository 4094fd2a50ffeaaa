"""What fm_interaction needs, what its kernels visit, and the XLA fallback against (X Xᵀ) Y."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels import timing
from pallas_kernels.fm_interaction.api import fm_interaction
from pallas_kernels.fm_interaction.shapes import SHAPES, Shape
from pallas_kernels.fm_interaction.tiling import Tiling

# Products of (N, K, D): M, P; and M, P, dM, dY, twice dX. The kernels do none of them twice.
PRODUCTS = {"forward": 2, "backward": 6}
QUICK = ("criteo_n16_k8_d16", "paper_n192_k96_d160")


def rows(quick: bool) -> Iterator[dict]:
  """One row a named bfloat16 shape and direction; the CPU times float32, forward and backward."""
  for name, shape in SHAPES.items():
    if shape.dtype != "bfloat16" or (quick and name not in QUICK):
      continue
    times = _times(shape, quick)
    for direction in PRODUCTS:
      yield {
        "op": "fm_interaction",
        "shape": name,
        "direction": direction,
        **_work(shape, direction),
        "baseline": "(X Xᵀ) Y and the norm, forward and backward, float32",
        **times,
      }


def _work(shape: Shape, direction: str) -> dict:
  """Of a whole batch; the share counts what pieces pad of N, K and D."""
  cut = Tiling(batch=shape.batch, units=shape.units, width=shape.width, rank=shape.rank)
  needed = shape.batch * 2 * shape.units * shape.rank * shape.width * PRODUCTS[direction]
  visited = shape.batch * 2 * cut.n.padded * cut.k.padded * cut.d.padded * PRODUCTS[direction]
  tiles = len(cut.n.pieces) * len(cut.k.pieces) * len(cut.d.pieces) * PRODUCTS[direction]
  x, y, *learnt, out = (s.size * s.dtype.itemsize for s in shape.args())
  passed = x + y + sum(learnt) + out
  return {
    "flops_needed": needed,
    "bytes_needed": passed if direction == "forward" else 2 * passed - out,
    "flops_visited": visited,
    "tiles_visited": shape.batch * tiles,
    "useful_tile_share": needed / visited,
  }


def _naive(x_BND, y, scale_F, bias_F):
  pairs = jnp.einsum("bnd,bmd->bnm", x_BND, x_BND) @ y
  out = jax.nn.standardize(pairs.reshape(len(x_BND), -1), axis=1, epsilon=1e-6)
  return out * scale_F + bias_F


def _times(shape: Shape, quick: bool) -> dict[str, float]:
  each = shape.units**2 * (shape.width + shape.rank)
  batch = 2 if quick else max(1, min(2048, 2**28 // each))
  keys = jax.random.split(jax.random.key(0), 5)
  x_BND = jax.random.normal(keys[0], (batch, shape.units, shape.width))
  y = (batch, shape.units, shape.rank) if shape.attentive else (shape.units, shape.rank)
  y = jax.random.normal(keys[1], y) * shape.units**-0.5
  scale_F, bias_F = (jax.random.normal(k, (shape.units * shape.rank,)) for k in keys[2:4])
  gradient_BF = jax.random.normal(keys[4], (batch, scale_F.size))

  def both_ways(fn):
    def run(*inputs):
      out, vjp = jax.vjp(fn, *inputs)
      return out, vjp(gradient_BF)

    return functools.partial(jax.jit(run), x_BND, y, scale_F, bias_F)

  ours = lambda name: both_ways(functools.partial(fm_interaction, implementation=name))
  return timing.beside(ours, both_ways(_naive), repeats=1 if quick else 7)
