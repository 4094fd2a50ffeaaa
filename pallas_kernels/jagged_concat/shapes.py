"""Shapes at which concatenation is compiled. Timed: those of `jagged_pool`."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case
from pallas_kernels.jagged_concat import api

# Segments, rows of every array, width, dtype.
PROGRAMS = {
  "zipf_mean100_w128": (4_096, (409_600, 204_800), 128, jnp.bfloat16),
  "four_w256_float32": (256, (65_536, 32_768, 16_384, 256), 256, jnp.float32),
  "one_long_w96": (12, (16_384, 96), 96, jnp.bfloat16),
}


def _concat(xs, offsets):
  return api.jagged_concat(xs, offsets, implementation="triton")


def _gradient(xs, offsets, dy):
  return jax.vjp(lambda xs: _concat(xs, offsets)[0], xs)[1](dy)


def report_cases() -> Iterator[Case]:
  """Every shape, forward and backward."""
  for shape, (S, Ts, W, dtype) in PROGRAMS.items():
    xs = tuple(jax.ShapeDtypeStruct((T, W), dtype) for T in Ts)
    offsets = (jax.ShapeDtypeStruct((S + 1,), jnp.int32),) * len(Ts)
    dy = jax.ShapeDtypeStruct((sum(Ts), W), dtype)
    for direction, fn, args in (
      ("forward", _concat, (xs, offsets)),
      ("backward", _gradient, (xs, offsets, dy)),
    ):
      yield Case(
        op="jagged_concat",
        implementation="triton",
        direction=direction,
        shape=shape,
        fn=fn,
        args=args,
        kernels={f"jagged_concat_{direction}": False},
      )
