"""fm_interaction as Pallas kernels in the Triton lowering: one program, some examples in turn.

  forward   M = Xᵀ Y | P = X M and its moments | P normalised
  backward  M | P, moments of P and dOut | dP | dM = Xᵀ dP | dX = dP Mᵀ + Y dMᵀ, dY = X dM

What a stage leaves to the next stays in registers or, of a larger example, in pages of the
program's own, which it writes anew for every example: their size does not grow with the batch.

Letters: B examples, N units, D width of a unit, K rank, P programs, R rows and C columns of a tile.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.fm_interaction.tiling import Axis, Tiling

Shape = jax.ShapeDtypeStruct


def forward(x_BND, y, scale_F, bias_F, *, eps: float, interpret: bool) -> jax.Array:
  """(B, N, D), (N, K) or (B, N, K) -> (B, N * K)."""
  inputs = _named(x_BND, y, scale_F, bias_F)
  outputs = {"out": Shape((len(x_BND), *y.shape[-2:]), x_BND.dtype)}
  out = _call("forward", inputs, outputs, (), eps, interpret)["out"]
  return out.reshape(len(x_BND), -1)


def backward(x_BND, y, scale_F, bias_F, gradient_BF, *, eps: float, interpret: bool):
  """Gradients of x, y, scale and bias."""
  inputs = _named(x_BND, y, scale_F, None)
  # What examples share has a sum for each program, and the sum of these: no atomics.
  sums = [name for name, array in inputs.items() if array.ndim == 2]
  dtypes = {"x": x_BND.dtype, "y": y.dtype}
  outputs = {name: Shape(inputs[name].shape, dtypes[name]) for name in dtypes if name not in sums}
  inputs["gradient"] = gradient_BF.reshape(len(x_BND), *y.shape[-2:])
  of = _call("backward", inputs, outputs, sums, eps, interpret)
  of_y = of["y"].sum(0).astype(y.dtype) if "y" in sums else of["y"]
  of_scale = of["scale"].sum(0).reshape(-1).astype(scale_F.dtype) if "scale" in sums else None
  of_bias = None if bias_F is None else gradient_BF.sum(0, dtype=jnp.float32).astype(bias_F.dtype)
  return of["x"], of_y, of_scale, of_bias


def _named(x_BND, y, scale_F, bias_F) -> dict[str, jax.Array]:
  learnt = {"scale": scale_F, "bias": bias_F}
  return {"x": x_BND, "y": y.astype(x_BND.dtype)} | {
    name: array.reshape(y.shape[-2:]) for name, array in learnt.items() if array is not None
  }


def _call(direction, inputs, outputs, sums, eps, interpret):
  """Runs the kernel; `sums` come out as (P, N, K), one for each program."""
  (batch, units, width), rank = inputs["x"].shape, inputs["y"].shape[-1]
  dtype = inputs["x"].dtype
  tiling = Tiling(batch=batch, units=units, width=width, rank=rank)
  own = {name: Shape((units, rank), jnp.float32) for name in sums}
  if tiling.paged:
    own |= {"mixed": Shape((width, rank), dtype), "pairs": Shape((units, rank), jnp.float32)}
    if direction == "backward":
      own |= {"of_pairs": Shape((units, rank), dtype), "of_mixed": Shape((width, rank), dtype)}
  inputs = inputs | {"one": jnp.ones((1,), jnp.int32)}
  programs = tiling.programs(sum(s.size * s.dtype.itemsize for s in own.values()))
  outputs = outputs | {name: Shape((programs, *s.shape), s.dtype) for name, s in own.items()}
  body = {"forward": _forward_example, "backward": _backward_example}[direction]
  barrier = (lambda: None) if interpret else plgpu.debug_barrier

  def kernel(*refs):
    ins, outs = dict(zip(inputs, refs)), dict(zip(outputs, refs[len(inputs) :]))
    program = pl.program_id(0)

    def turn(i, _):
      body(_Example(tiling, ins, outs, program, program + i * programs, i, barrier), eps)

    lax.fori_loop(0, (batch - program + programs - 1) // programs, turn, None)

  results = pl.pallas_call(
    kernel,
    grid=(programs,),
    in_specs=[pl.no_block_spec] * len(inputs),
    out_specs=[pl.no_block_spec] * len(outputs),
    out_shape=list(outputs.values()),
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(
      num_warps=tiling.warps, num_stages=tiling.stages(dtype.itemsize, direction == "backward")
    ),
    name=f"fm_interaction_{direction}",
  )(*inputs.values())
  return dict(zip(outputs, results))


def _forward_example(at: _Example, eps: float) -> None:
  at.mix(at.y, "mixed")
  (mean,), (variance,) = at.moments(lambda n, k: (at.pair(n, k),), 1)
  inverse = lax.rsqrt(variance + eps)

  def write(n, k):
    normal = (at.take("pairs", n, k) - mean) * inverse
    at.write("out", normal * at.learnt("scale", n, k, 1.0) + at.learnt("bias", n, k, 0.0), n, k)

  at.tiles(at.tiling.n, at.tiling.k, write)


def _backward_example(at: _Example, eps: float) -> None:
  tiling = at.tiling
  at.mix(at.y, "mixed")
  means, products = at.moments(lambda n, k: (at.pair(n, k), at.scaled(n, k)), 2)
  inverse = lax.rsqrt(products[0] + eps)
  slope = products[1] * inverse

  # Outside (N, K) dP is not 0; but X and Y are, there, and nothing is written.
  def of_pair(n, k):
    normal = (at.take("pairs", n, k) - means[0]) * inverse
    of_pair = (at.scaled(n, k) - means[1] - normal * slope) * inverse
    at.leave("of_pairs", of_pair.astype(at.dtype), n, k)
    if "scale" in at.outs:
      at.add("scale", normal * at.gradient(n, k), n, k)

  at.tiles(tiling.n, tiling.k, of_pair)
  at.mix(functools.partial(at.take, "of_pairs"), "of_mixed")

  def of_x(n, d):
    def body(k, total):
      total += plgpu.dot(at.take("of_pairs", n, k), at.take("mixed", d, k), trans_b=True)
      return total + plgpu.dot(at.y(n, k), at.take("of_mixed", d, k), trans_b=True)

    at.write("x", at.each(tiling.k, body, jnp.zeros((n[1], d[1]), jnp.float32)), n, d)

  def of_y(n, k):
    (at.add if at.shared else at.write)("y", at.times("of_mixed", n, k), n, k)

  at.tiles(tiling.n, tiling.d, of_x)
  at.tiles(tiling.n, tiling.k, of_y)


class _Example:
  """Tiles of one example, by pieces n, d, k of units, width and rank."""

  def __init__(self, tiling: Tiling, ins, outs, program, example, turn, barrier):
    self.tiling, self.ins, self.outs, self.barrier = tiling, ins, outs, barrier
    self.program, self.example, self.turn = program, example, turn
    self.dtype = ins["x"].dtype
    self.shared = len(ins["y"].shape) == 2
    self.kept = {}
    one = ins["one"][0]
    self.each = lambda axis, *body_carry: axis.each(one, *body_carry)

  def x(self, n, d):
    return _load(self.ins["x"], n, d, self.example)

  def y(self, n, k):
    lead = () if self.shared else (self.example,)
    return _load(self.ins["y"], n, k, *lead)

  def gradient(self, n, k):
    return _load(self.ins["gradient"], n, k, self.example).astype(jnp.float32)

  def scaled(self, n, k):
    return self.gradient(n, k) * self.learnt("scale", n, k, 1.0)

  def learnt(self, name: str, n, k, otherwise: float):
    """A tile of the scale or the bias; `otherwise` where it is not learnt."""
    return _load(self.ins[name], n, k).astype(jnp.float32) if name in self.ins else otherwise

  def write(self, name: str, tile, rows, columns):
    _store(self.outs[name], tile, rows, columns, self.example)

  def add(self, name: str, tile, n, k):
    """Adds to this program's sums, which begin with its first turn."""
    before = _load(self.outs[name], n, k, self.program)
    tile += jnp.where(self.turn > 0, before, 0.0)
    _store(self.outs[name], tile, n, k, self.program)

  def leave(self, name: str, tile, rows, columns):
    """Leaves a tile to a later stage: on a page, or just where it is."""
    if self.tiling.paged:
      _store(self.outs[name], tile, rows, columns, self.program)
    else:
      self.kept[name, rows, columns] = tile

  def take(self, name: str, rows, columns):
    if self.tiling.paged:
      return _load(self.outs[name], rows, columns, self.program)
    return self.kept[name, rows, columns]

  def tiles(self, rows: Axis, columns: Axis, body):
    """body(row, column) for every tile; a stage."""
    self.each(rows, lambda r, _: self.each(columns, lambda c, _: body(r, c)))
    self.barrier()  # Other threads may read what these have written.

  def mix(self, other, name: str):
    """Leaves Xᵀ other, (D, K); other(n, k) is a tile of it."""

    def tile(d, k):
      body = lambda n, total: total + plgpu.dot(self.x(n, d), other(n, k), trans_a=True)
      total = self.each(self.tiling.n, body, jnp.zeros((d[1], k[1]), jnp.float32))
      self.leave(name, total.astype(self.dtype), d, k)

    self.tiles(self.tiling.d, self.tiling.k, tile)

  def times(self, name: str, n, k):
    """A tile of X mixed, (N, K), float32."""
    body = lambda d, total: total + plgpu.dot(self.x(n, d), self.take(name, d, k))
    return self.each(self.tiling.d, body, jnp.zeros((n[1], k[1]), jnp.float32))

  def pair(self, n, k):
    """A tile of P = X M, which it leaves, too."""
    tile = self.times("mixed", n, k)
    self.leave("pairs", tile, n, k)
    return tile

  def moments(self, values, count: int):
    """Means of values(n, k), and covariances of the first of them with each, over all (N, K).

    Moments of tiles are merged (Chan), which takes no difference of large sums.
    """
    units, rank = self.tiling.n, self.tiling.k

    def merge(n, k, carry):
      seen, means, products = carry
      tiles = values(n, k)
      more = jnp.float32(1) * units.inside(n) * rank.inside(k)
      of_tile = [jnp.sum(tile) / more for tile in tiles]  # Outside (N, K) tiles are 0.
      centred = [tile - mean for tile, mean in zip(tiles, of_tile)]
      _, mask = _at((units.size, rank.size), n, k)
      if mask is not None:
        centred = [jnp.where(mask, tile, 0.0) for tile in centred]
      share = more / (seen + more)
      apart = [a - b for a, b in zip(of_tile, means)]
      means = [mean + a * share for mean, a in zip(means, apart)]
      products = [
        product + jnp.sum(centred[0] * c) + apart[0] * a * seen * share
        for product, c, a in zip(products, centred, apart)
      ]
      return seen + more, means, products

    zeros = [jnp.float32(0)] * count
    _, means, products = self.each(
      units,
      lambda n, carry: self.each(rank, functools.partial(merge, n), carry),
      (jnp.float32(0), zeros, zeros),
    )
    self.barrier()  # The pairs were left.
    return means, [product / (units.size * rank.size) for product in products]


def _at(shape, rows, columns, *lead):
  """Indices of a tile of the last two axes, and a mask of what lies inside; None: all does."""
  index, mask = [], None
  for size, (start, length), form in zip(shape[-2:], (rows, columns), ((-1, 1), (1, -1))):
    index.append(start + jnp.arange(length).reshape(form))
    if size % length:
      inside = jnp.broadcast_to(index[-1] < size, (rows[1], columns[1]))
      mask = inside if mask is None else mask & inside
  return (*lead, *index), mask


def _load(ref, rows, columns, *lead):
  at, mask = _at(ref.shape, rows, columns, *lead)
  return plgpu.load(ref.at[at], mask=mask, other=None if mask is None else 0.0)


def _store(ref, value, rows, columns, *lead):
  at, mask = _at(ref.shape, rows, columns, *lead)
  plgpu.store(ref.at[at], value.astype(ref.dtype), mask=mask)
