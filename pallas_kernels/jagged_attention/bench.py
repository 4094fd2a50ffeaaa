"""Attention over events beside attention over padded sequences; on a GPU beside cuDNN as well."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import case, timing
from pallas_kernels.jagged_attention import shapes, tiles, triton
from pallas_kernels.jagged_attention.activation import POINTWISE
from pallas_kernels.jagged_attention.api import jagged_attention
from pallas_kernels.jagged_attention.visible import Visible, visible

H, D = shapes.TIMED_HEADS, shapes.TIMED_WIDTH
PRODUCTS = {"forward": 2, "backward": 5}  # Of D multiplications and additions, a pair.
KERNELS = {"forward": 2, "backward_queries": 3, "backward_keys": 4}


def rows(quick: bool) -> Iterator[dict[str, Any]]:
  """A row for every mask and set of lengths, forward and backward; then one of growing fill."""
  for shape, (name, options) in shapes.TIMED.items():
    if quick and shape not in shapes.QUICK:
      continue
    length_S = shapes.lengths(name, quick)
    yield {
      "op": "jagged_attention",
      "shape": shape,
      "baseline": "padded dense, masked",
      **work(length_S, options),
      **_times(length_S, options),
    }
  yield _fill(quick)


def seen_of(length_S: np.ndarray, options: dict[str, Any]) -> tuple[jax.Array, Visible]:
  offset_S1 = jnp.asarray(case.offsets(length_S))
  masks = {k: v for k, v in options.items() if k in ("causal", "window", "block")}
  return offset_S1, visible(offset_S1, offset_S1, None, int(length_S.sum()), **masks)


def work(length_S: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
  """FLOPs and bytes that the pairs need, and those of the tiles that the kernels visit (bf16)."""
  offset_S1, seen = seen_of(length_S, options)
  T = len(seen.lo_T)
  pairs = int(np.sum(np.asarray(seen.hi_T - seen.lo_T), dtype=np.int64))
  visited = tiles_visited = 0
  for direction, products in KERNELS.items():
    shape = triton.launch(D, 2, biased=False, direction=direction)
    if direction == "backward_keys":
      cut = tiles.key_tiles(offset_S1, seen.lo_T, seen.hi_T, T, shape.keys)
    else:
      cut = tiles.query_tiles(offset_S1, seen.lo_T, seen.hi_T, shape.queries)
    other = shape.queries if direction == "backward_keys" else shape.keys
    visits = H * int(np.sum(-(-np.asarray(cut.last_N - cut.first_N) // other)))
    visited += 2 * D * shape.queries * shape.keys * visits * products
    tiles_visited += visits
  # Scores are computed three times, and needed once forward and once backward.
  needed = 2 * D * H * pairs * sum(PRODUCTS.values())
  ideal = 2 * D * H * pairs * sum(KERNELS.values())
  return {
    "flops_needed": needed,
    # q, k, v, out; then these, g, and three gradients: once each.
    "bytes_needed": 2 * T * H * D * (4 + 8),
    "flops_visited": visited,
    "tiles_visited": tiles_visited,
    # Pairs that are seen, of all in the tiles visited, over the nine products that kernels make.
    "useful_tile_share": ideal / visited,
  }


def _random(*shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def _with_gradient(fn: Callable) -> Callable:
  @jax.jit
  def both(q, k, v, *others):
    out, pull = jax.vjp(lambda *x: fn(*x, *others), q, k, v)
    return out, pull(out)  # Any cotangent will do.

  return both


def _ours(options: dict[str, Any], implementation: str | None) -> Callable:
  return lambda q, k, v, offset_S1: jagged_attention(
    q, k, v, offset_S1, implementation=implementation, **options
  )


def _times(length_S: np.ndarray, options: dict[str, Any]) -> dict[str, float]:
  L = int(length_S.max())
  x_THD, x_SLHD = _random(int(length_S.sum()), H, D), _random(len(length_S), L, H, D)
  theirs = _with_gradient(_padded(options))
  offset_S1, length_S = jnp.asarray(case.offsets(length_S)), jnp.asarray(length_S)

  def call(name: str) -> timing.Call:
    ours = _with_gradient(_ours(options, name))
    return lambda: ours(x_THD, x_THD, x_THD, offset_S1)

  return timing.beside(call, lambda: theirs(x_SLHD, x_SLHD, x_SLHD, length_S), repeats=5)


def _padded(options: dict[str, Any]) -> Callable:
  """What a user writes for padded sequences: all scores of each, masked."""
  activation = options.get("activation", "softmax")

  def attend(q_SLHD, k_SLHD, v_SLHD, length_S):
    place_L = jnp.arange(q_SLHD.shape[1])
    far_LL = place_L[:, None] - place_L[None, :]
    seen_LL = jnp.ones_like(far_LL, bool)
    if options.get("causal"):
      seen_LL &= far_LL >= 0
    if window := options.get("window"):
      seen_LL &= jnp.abs(far_LL) < window
    if block := options.get("block"):
      seen_LL &= place_L[:, None] // block == place_L[None, :] // block
    inside_SL = place_L < length_S[:, None]
    seen = (seen_LL & inside_SL[:, :, None] & inside_SL[:, None, :])[:, None]
    score = jnp.einsum("sqhd,skhd->shqk", q_SLHD, k_SLHD)
    if activation == "softmax":
      weight = jax.nn.softmax(jnp.where(seen, score / D**0.5, -1e30), axis=-1)
    else:
      weight = POINTWISE[activation].value(score, jax.nn.sigmoid) / options["norm"]
    return jnp.einsum("shqk,skhd->sqhd", jnp.where(seen, weight, 0), v_SLHD)

  return attend


def _fill(quick: bool) -> dict[str, Any]:
  """One program whose room is filled to a quarter, a half and wholly, beside dense for all of it.

  Segments have one length or none, so that the pairs follow the share.
  """
  T, S = (256, 4) if quick else (8_192, 16)
  options = {"activation": "silu", "causal": True, "norm": T // S}
  ours, theirs = _with_gradient(_ours(options, "xla")), _with_gradient(_padded(options))
  x_THD = _random(T, H, D)
  filled = {
    share: np.array([T // S] * int(S * share) + [0] * (S - int(S * share)), np.int32)
    for share in (0.25, 0.5, 1.0)
  }
  offsets = {share: jnp.asarray(case.offsets(length_S)) for share, length_S in filled.items()}
  calls = {f"{share:.0%}": lambda o=o: ours(x_THD, x_THD, x_THD, o) for share, o in offsets.items()}
  x_SLHD, half_S = x_THD.reshape(S, T // S, H, D), jnp.asarray(filled[0.5])
  calls["dense"] = lambda: theirs(x_SLHD, x_SLHD, x_SLHD, half_S)
  ms = {name: 1e3 * s for name, s in timing.side_by_side(calls, repeats=5).items()}
  return {
    "op": "jagged_attention",
    "shape": "room_half_filled",
    "baseline": "padded dense of the whole room",
    **work(filled[0.5], options),
    "xla_ms": ms["50%"],
    "padded_ms": ms["dense"],
    "xla_over_padded_speed": ms["dense"] / ms["50%"],
    "xla_ms_by_fill": {name: ms[name] for name in ("25%", "50%", "100%")},
  }


def gpu_rows() -> Iterator[dict[str, Any]]:
  """TFLOP/s of the kernels, and of cuDNN and tokamax where they have the function (softmax).

  Plans of tiles are made anew in every call, and counted.
  """
  for shape, length_S, heads, width in (
    ("8x4096_w128", np.full(8, 4_096), 8, 128),
    ("8x4096_w64", np.full(8, 4_096), 8, 64),
    ("2x16384_w128", np.full(2, 16_384), 8, 128),
    ("2x16384_w64", np.full(2, 16_384), 8, 64),
    ("2x16384_w256", np.full(2, 16_384), 4, 256),
    ("zipf_w128", shapes.lengths("zipf_mean100", False) * 8, 8, 128),
  ):
    for activation in ("softmax", "silu"):
      options = {"causal": True, "activation": activation}
      if activation == "silu":
        options |= {"norm": float(length_S.max()), "scale": width**-0.5}
      yield {
        "op": "jagged_attention",
        "shape": f"gpu_{shape}_{activation}",
        **_tflops(length_S, heads, width, options),
      }


def _tflops(length_S: np.ndarray, heads: int, width: int, options) -> dict[str, float]:
  x_THD = _random(int(length_S.sum()), heads, width).astype(jnp.bfloat16)
  offset_S1, seen = seen_of(length_S, options)
  pairs = int(np.sum(np.asarray(seen.hi_T - seen.lo_T), dtype=np.int64))
  args = (x_THD, x_THD, x_THD, offset_S1)
  rivals = {name: (_ours(options, name), args) for name in ("triton", "mosaic")}
  if options["activation"] == "softmax" and len(set(length_S)) == 1 and width <= 128:
    dense = (x_THD.reshape(len(length_S), -1, heads, width),) * 3
    cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    rivals["cudnn"] = (cudnn, dense)
    if importlib.util.find_spec("tokamax"):
      import tokamax

      rivals["tokamax"] = (functools.partial(tokamax.dot_product_attention, is_causal=True), dense)
  calls = {}
  for name, (fn, args) in rivals.items():
    calls[name, "forward"] = functools.partial(jax.jit(fn), *args)
    calls[name, "both"] = functools.partial(_with_gradient(fn), *args)
  seconds = timing.side_by_side(calls)
  found = {}
  for name in rivals:
    took = {"forward": seconds[name, "forward"]}
    took["backward"] = seconds[name, "both"] - took["forward"]
    for direction, products in PRODUCTS.items():
      flops = 2 * width * heads * pairs * products
      found[f"{name}_{direction}_tflops"] = flops / took[direction] / 1e12
  return found
