"""Attention over events beside attention over padded sequences; on a GPU beside cuDNN as well."""

from __future__ import annotations

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
  shape = triton.launch(D, 2, biased=False, direction="backward_keys")
  T = len(seen.lo_T)
  pairs = int(np.sum(np.asarray(seen.hi_T - seen.lo_T), dtype=np.int64))
  by_queries = tiles.query_tiles(offset_S1, seen.lo_T, seen.hi_T, shape.queries)
  by_keys = tiles.key_tiles(offset_S1, seen.lo_T, seen.hi_T, T, shape.keys)
  visits = [
    int(np.sum(-(-np.asarray(cut.last_N - cut.first_N) // other)))
    for cut, other in ((by_queries, shape.keys), (by_keys, shape.queries))
  ]
  # The forward kernel and that of queries' gradients, 2 and 3 products, go by queries; the other,
  # with 4, by keys. Scores are computed three times, and needed once forward and once backward.
  needed = 2 * D * H * pairs * (2 + 5)
  visited = 2 * D * H * shape.queries * shape.keys * (visits[0] * (2 + 3) + visits[1] * 4)
  ideal = 2 * D * H * pairs * (2 + 3 + 4)
  return {
    "flops_needed": needed,
    # q, k, v, out; then these, g, and three gradients: once each.
    "bytes_needed": 2 * T * H * D * (4 + 8),
    "flops_visited": visited,
    "tiles_visited": (2 * visits[0] + visits[1]) * H,
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
  ours, theirs = _with_gradient(_ours(options, "xla")), _with_gradient(_padded(options))
  offset_S1, length_S = jnp.asarray(case.offsets(length_S)), jnp.asarray(length_S)
  seconds = timing.side_by_side(
    {
      "ours": lambda: ours(x_THD, x_THD, x_THD, offset_S1),
      "theirs": lambda: theirs(x_SLHD, x_SLHD, x_SLHD, length_S),
    },
    repeats=5,
  )
  return {
    "xla_ms": 1e3 * seconds["ours"],
    "padded_ms": 1e3 * seconds["theirs"],
    "xla_over_padded_speed": seconds["theirs"] / seconds["ours"],
  }


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
  """TFLOP/s of the kernels, and of cuDNN and tokamax where they have the function (softmax)."""
  heads, width = 8, 128
  for shape, length_S in (
    ("8x4096", np.full(8, 4_096)),
    ("zipf", shapes.lengths("zipf_mean100", False) * 8),
  ):
    for activation in ("softmax", "silu"):
      options = {"causal": True, "activation": activation}
      if activation == "silu":
        options["norm"] = float(length_S.max())
      x_THD = _random(int(length_S.sum()), heads, width).astype(jnp.bfloat16)
      offset_S1, seen = seen_of(length_S, options)
      pairs = int(np.sum(np.asarray(seen.hi_T - seen.lo_T), dtype=np.int64))
      rivals = {"triton": (_ours(options, "triton"), (x_THD, x_THD, x_THD, offset_S1))}
      if activation == "softmax" and shape != "zipf":
        x_SLHD = x_THD.reshape(len(length_S), -1, heads, width)
        dense = lambda q, k, v: jax.nn.dot_product_attention(
          q, k, v, is_causal=True, implementation="cudnn"
        )
        rivals["cudnn"] = (dense, (x_SLHD,) * 3)
        if importlib.util.find_spec("tokamax"):
          import tokamax

          fused = lambda q, k, v: tokamax.dot_product_attention(q, k, v, is_causal=True)
          rivals["tokamax"] = (fused, (x_SLHD,) * 3)
      calls = {}
      for name, (fn, args) in rivals.items():
        forward, both = jax.jit(fn), _with_gradient(fn)
        calls[name, "forward"] = lambda f=forward, a=args: f(*a)
        calls[name, "both"] = lambda f=both, a=args: f(*a)
      seconds = timing.side_by_side(calls)
      row = {"op": "jagged_attention", "shape": f"gpu_{shape}_{activation}"}
      for name in rivals:
        took = {"forward": seconds[name, "forward"]}
        took["backward"] = seconds[name, "both"] - took["forward"]
        for direction, products in PRODUCTS.items():
          flops = 2 * width * heads * pairs * products
          row[f"{name}_{direction}_tflops"] = flops / took[direction] / 1e12
      yield row
