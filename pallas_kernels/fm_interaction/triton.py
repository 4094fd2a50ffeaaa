"""fm_interaction as Pallas kernels in the Triton lowering: one program, some examples in turn.

Mixtures M = Xᵀ Y of an example stay in registers or, where they are large, in a page of the
program's own that it writes anew for every example. Products P = X M are made tile by tile, anew
in every pass over units that needs them, or kept where tiles are few:

  forward   M | moments of P | P normalised and written
  backward  M | moments of P and dOut | dM = Xᵀ dP | dX = dP Mᵀ + Y dMᵀ, dY = X dM

Letters: B examples, N units, D width of a unit, K rank, T rows and C columns of a tile.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.fm_interaction.tiling import Tiling


def forward(x_BND, y, scale_F, bias_F, *, eps: float, interpret: bool) -> jax.Array:
  """(B, N, D), (N, K) or (B, N, K) -> (B, N * K)."""
  inputs = _named(x_BND, y, scale_F, bias_F)
  outputs = {"out": jax.ShapeDtypeStruct((len(x_BND), *y.shape[-2:]), x_BND.dtype)}
  return _call("forward", inputs, outputs, eps, interpret)["out"].reshape(len(x_BND), -1)


def backward(x_BND, y, scale_F, bias_F, gradient_BF, *, eps: float, interpret: bool):
  """Gradients of x, y, scale and bias."""
  inputs = _named(x_BND, y, scale_F, bias_F)
  # What examples share has one sum for each program, in float32, and the sum of these: no atomics.
  shared = [name for name, array in inputs.items() if array.ndim == 2]
  outputs = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in inputs.items()}
  for name in shared:
    shape = (_tiling(inputs).programs, *inputs[name].shape)
    outputs[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
  inputs["gradient"] = gradient_BF.reshape(len(x_BND), *y.shape[-2:])
  of = _call("backward", inputs, outputs, eps, interpret)
  of |= {name: of[name].sum(0).astype(inputs[name].dtype) for name in shared}
  return of["x"], of["y"], *(of[n].reshape(-1) if n in of else None for n in ("scale", "bias"))


def _named(x_BND, y, scale_F, bias_F) -> dict[str, jax.Array]:
  learnt = {"scale": scale_F, "bias": bias_F}
  return {"x": x_BND, "y": y} | {
    name: array.reshape(y.shape[-2:]) for name, array in learnt.items() if array is not None
  }


def _tiling(inputs) -> Tiling:
  batch, units, width = inputs["x"].shape
  return Tiling(batch=batch, units=units, width=width, rank=inputs["y"].shape[-1])


def _call(direction, inputs, outputs, eps, interpret):
  tiling = _tiling(inputs)
  if tiling.paged:
    page = (tiling.programs, tiling.width, tiling.rank)
    page = jax.ShapeDtypeStruct(page, inputs["x"].dtype)
    outputs = outputs | dict.fromkeys(("mixed", "of_mixed")[: 1 + (direction == "backward")], page)
  body = {"forward": _forward_example, "backward": _backward_example}[direction]
  barrier = (lambda: None) if interpret else plgpu.debug_barrier

  def kernel(*refs):
    ins, outs = dict(zip(inputs, refs)), dict(zip(outputs, refs[len(inputs) :]))
    program, programs = pl.program_id(0), tiling.programs

    def turn(i, _):
      body(_Example(tiling, ins, outs, program, program + i * programs, barrier), i, eps)
      barrier()  # The next turn may read sums in other threads, and turns pages over.

    lax.fori_loop(0, (tiling.batch - program + programs - 1) // programs, turn, None)

  results = pl.pallas_call(
    kernel,
    grid=(tiling.programs,),
    in_specs=[pl.no_block_spec] * len(inputs),
    out_specs=[pl.no_block_spec] * len(outputs),
    out_shape=list(outputs.values()),
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(
      num_warps=tiling.warps(direction == "backward"), num_stages=tiling.stages
    ),
    name=f"fm_interaction_{direction}",
  )(*inputs.values())
  return dict(zip(outputs, results))


def _forward_example(at: _Example, turn: jax.Array, eps: float) -> None:
  del turn
  (mean,), (variance,) = at.moments(lambda n, k: (at.pairs(n, k),), 1)
  inverse = lax.rsqrt(variance + eps)

  def write(n, _):
    for k in at.tiling.k:
      normal = (at.pairs(n, k) - mean) * inverse
      _store(at.outs["out"], normal * at.scale(n, k) + at.bias(n, k), n, k, at.example)

  at.tiling.over_units(write, None)


def _backward_example(at: _Example, turn: jax.Array, eps: float) -> None:
  scaled = lambda n, k: at.gradient(n, k) * at.scale(n, k)
  means, products = at.moments(lambda n, k: (at.pairs(n, k), scaled(n, k)), 2)
  inverse = lax.rsqrt(products[0] + eps)
  slope = products[1] * inverse
  normal = lambda n, k: (at.pairs(n, k) - means[0]) * inverse

  # Outside (N, K) it is not 0; but X and Y are, there, and nothing is written.
  def of_pairs(n, k):
    return ((scaled(n, k) - means[1] - normal(n, k) * slope) * inverse).astype(at.dtype)

  of_mixed = at.against(of_pairs, "of_mixed")

  def write(n, _):
    sums = [jnp.zeros((n[1], size), jnp.float32) for _, size in at.tiling.d]
    for k in at.tiling.k:
      of_p, y = of_pairs(n, k), at.y(n, k)
      for i, d in enumerate(at.tiling.d):
        sums[i] += plgpu.dot(of_p, at.mixed(d, k), trans_b=True)
        sums[i] += plgpu.dot(y, of_mixed(d, k), trans_b=True)
      of_y = at.times(n, k, of_mixed)
      if at.shared:
        at.add("y", of_y, n, k, turn)
      else:
        _store(at.outs["y"], of_y, n, k, at.example)
      if "scale" in at.outs:
        at.add("scale", normal(n, k) * at.gradient(n, k), n, k, turn)
      if "bias" in at.outs:
        at.add("bias", at.gradient(n, k), n, k, turn)
    for d, of_x in zip(at.tiling.d, sums):
      _store(at.outs["x"], of_x, n, d, at.example)

  at.tiling.over_units(write, None)


class _Example:
  """Tiles of one example, by pieces n, d, k of units, width and rank."""

  def __init__(self, tiling: Tiling, ins, outs, program, example, barrier):
    self.tiling, self.ins, self.outs, self.barrier = tiling, ins, outs, barrier
    self.program, self.example = program, example
    self.dtype = ins["x"].dtype
    self.shared = len(ins["y"].shape) == 2
    self.kept = {}
    self.mixed = self.against(self.y, "mixed")

  def x(self, n, d):
    return _load(self.ins["x"], n, d, self.example)

  def y(self, n, k):
    lead = () if self.shared else (self.example,)
    return _load(self.ins["y"], n, k, *lead).astype(self.dtype)

  def gradient(self, n, k):
    return _load(self.ins["gradient"], n, k, self.example).astype(jnp.float32)

  def scale(self, n, k):
    return _load(self.ins["scale"], n, k).astype(jnp.float32) if "scale" in self.ins else 1.0

  def bias(self, n, k):
    return _load(self.ins["bias"], n, k).astype(jnp.float32) if "bias" in self.ins else 0.0

  def against(self, other, name: str):
    """Xᵀ other, (D, K): a function of (d, k) that gives tiles of x's dtype."""
    tiles = {}
    for k in self.tiling.k:

      def body(n, sums, k=k):
        z = other(n, k)
        dots = [plgpu.dot(self.x(n, d), z, trans_a=True) for d in self.tiling.d]
        return [s + dot for s, dot in zip(sums, dots)]

      zeros = [jnp.zeros((size, k[1]), jnp.float32) for _, size in self.tiling.d]
      for d, tile in zip(self.tiling.d, self.tiling.over_units(body, zeros)):
        if self.tiling.paged:
          _store(self.outs[name], tile, d, k, self.program)
        else:
          tiles[d, k] = tile.astype(self.dtype)
    if not self.tiling.paged:
      return lambda d, k: tiles[d, k]
    self.barrier()  # Other threads will read what these have written.
    return lambda d, k: _load(self.outs[name], d, k, self.program)

  def times(self, n, k, mixed):
    """X mixed, (N, K), as a float32 tile."""
    return _sum(plgpu.dot(self.x(n, d), mixed(d, k)) for d in self.tiling.d)

  def pairs(self, n, k):
    """P = X M."""
    if self.tiling.looped:
      return self.times(n, k, self.mixed)
    if (n, k) not in self.kept:
      self.kept[n, k] = self.times(n, k, self.mixed)
    return self.kept[n, k]

  def moments(self, values, count: int):
    """Means of values(n, k), and covariances of the first of them with each, over all (N, K).

    Moments of tiles are merged (Chan), which takes no difference of large sums.
    """
    shape = (self.tiling.units, self.tiling.rank)

    def merge(n, k, carry):
      seen, means, products = carry
      tiles = values(n, k)
      inside = _at(shape, n, k, ())[1]
      more = _inside(n, shape[0]) * _inside(k, shape[1])
      of_tile = [jnp.sum(tile) / more for tile in tiles]  # Products outside (N, K) are 0.
      centred = [tile - mean for tile, mean in zip(tiles, of_tile)]
      if inside is not None:
        centred = [jnp.where(inside, tile, 0.0) for tile in centred]
      share = more / (seen + more)
      apart = [a - b for a, b in zip(of_tile, means)]
      means = [mean + a * share for mean, a in zip(means, apart)]
      products = [
        product + jnp.sum(centred[0] * c) + apart[0] * a * seen * share
        for product, c, a in zip(products, centred, apart)
      ]
      return seen + more, means, products

    def body(n, carry):
      return functools.reduce(lambda carry, k: merge(n, k, carry), self.tiling.k, carry)

    zeros = [jnp.float32(0)] * count
    _, means, products = self.tiling.over_units(body, (jnp.float32(0), zeros, zeros))
    return means, [product / (shape[0] * shape[1]) for product in products]

  def add(self, name, tile, n, k, turn):
    """Adds to this program's sums, which begin with its first turn."""
    ref = self.outs[name]
    at, inside = _at(ref.shape, n, k, (self.program,))
    begun = jnp.full(tile.shape, turn > 0)
    mask = begun if inside is None else begun & inside
    plgpu.store(ref.at[at], plgpu.load(ref.at[at], mask=mask, other=0.0) + tile, mask=inside)


def _inside(piece, size: int) -> float:
  """How much of a piece lies inside; one that starts with a loop's turn is whole."""
  start, length = piece
  return float(min(length, size - start) if isinstance(start, int) else length)


def _at(shape, rows, columns, lead):
  """Indices of a tile of the last two axes, and its mask of what lies inside; None: all of it."""
  row_T1 = rows[0] + jnp.arange(rows[1])[:, None]
  column_1C = columns[0] + jnp.arange(columns[1])[None, :]
  masks = []
  if _inside(rows, shape[-2]) < rows[1]:
    masks.append(row_T1 < shape[-2])
  if _inside(columns, shape[-1]) < columns[1]:
    masks.append(column_1C < shape[-1])
  mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), (rows[1], columns[1])) if masks else None
  return (*lead, row_T1, column_1C), mask


def _load(ref, rows, columns, *lead):
  at, mask = _at(ref.shape, rows, columns, lead)
  return plgpu.load(ref.at[at], mask=mask, other=None if mask is None else 0.0)


def _store(ref, value, rows, columns, *lead):
  at, mask = _at(ref.shape, rows, columns, lead)
  plgpu.store(ref.at[at], value.astype(ref.dtype), mask=mask)


def _sum(terms):
  return functools.reduce(jnp.add, terms)
