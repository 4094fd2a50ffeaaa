"""Jagged arrays of every set of lengths, poisoned outside the segments, in few shapes.

Compilation is what tests of kernels in the interpreter take their time for, so that sets of
lengths share a shape: empty segments are added at the end, and rows of nobody.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from compiled_quickly import ON_GPU

from pallas_kernels.case import LENGTHS, offsets

START = 3  # Rows of nobody in front.
IMPLEMENTATIONS = ("reference", "xla", "triton")
# Segments and rows that each set of lengths is laid out in; no row count divides by a tile.
SHAPES = {"zero_segments": (0, 7), "one_long": (12, 16_391), "many_short": (4_096, 12_397)}
SMALL = (20, 2_103)
# Programs here run once or twice, and the interpreter's are large.
_FAST = {
  "xla_backend_optimization_level": 0,
  "xla_cpu_parallel_codegen_split_count": 1,
  "xla_cpu_use_fusion_emitters": False,
}
if ON_GPU:
  _FAST = {}


def layout(name: str, start: int = START) -> tuple[np.ndarray, int]:
  """offsets_S1 and T of a set of lengths."""
  S, T = SHAPES.get(name, SMALL)
  length_S = LENGTHS[name]
  length_S = np.concatenate([length_S, np.zeros(S - len(length_S), np.int32)])
  offsets_S1 = offsets(length_S, start)
  assert offsets_S1[-1] < T
  return offsets_S1, T


def poisoned(rng: np.random.Generator, offsets_S1: np.ndarray, T: int, width: int) -> np.ndarray:
  """x_TW float64, exact in bfloat16 so that only sums round; NaN in rows of nobody."""
  x_TW = np.round(rng.standard_normal((T, width)) * 16) / 16
  x_TW[: offsets_S1[0]] = np.nan
  x_TW[offsets_S1[-1] :] = np.nan
  return x_TW


def compiled(fn):
  """`fn` jitted, without the optimisations that take longest."""
  return jax.jit(fn, compiler_options=_FAST)


@functools.cache
def with_gradient(op, implementation: str, **static):
  """(x, offsets, dy) -> (y, dx) of op(x, offsets, ...), compiled once a shape."""

  def both(x, offsets_S1, dy):
    fn = lambda x: op(x, offsets_S1, implementation=implementation, **static)
    y, pullback = jax.vjp(fn, x)
    return y, pullback(dy)[0]

  return compiled(both)


def check_close(got, want, size, dtype):
  """|got - want| within rounding: of sums, each of terms of `size` in all, and of the dtype."""
  got, want = np.asarray(got, np.float64), np.asarray(want)
  assert got.shape == want.shape
  rounding = {"float32": 1.2e-7, "float16": 5e-4, "bfloat16": 4e-3}[np.dtype(dtype).name]
  np.testing.assert_array_less(
    np.abs(got - want), rounding * np.abs(want) * 1.05 + 1e-6 * size + 1e-30
  )


def check_bench(rows, shapes):
  """Rows of a bench whose kernel visits few tiles too many, one for each shape."""
  found = list(rows)
  assert [row["shape"] for row in found] == list(shapes)
  for row in found:
    assert row["useful_tile_share"] > 0.9
    assert row["flops_visited"] >= row["flops_needed"] > 0
    assert row["xla_over_padded_speed"] == pytest.approx(row["padded_ms"] / row["xla_ms"])
