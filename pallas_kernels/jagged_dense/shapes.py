"""Shapes at which the conversions are compiled. Timed: those of `jagged_pool`."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case
from pallas_kernels.jagged_dense import api

# Segments, rows, length, width, dtype.
PROGRAMS = {
  "zipf_mean100_w128": (4_096, 409_600, 256, 128, jnp.bfloat16),
  "length512_w256_float32": (256, 131_072, 1_024, 256, jnp.float32),
  "one_long_w96": (12, 16_384, 16_384, 96, jnp.bfloat16),
  "short_w16": (65_536, 262_144, 7, 16, jnp.float16),
}


def report_cases() -> Iterator[Case]:
  """Both conversions at every shape, forward and backward."""
  for shape, (S, T, L, W, dtype) in PROGRAMS.items():
    x, y = (jax.ShapeDtypeStruct(s, dtype) for s in ((T, W), (S, L, W)))
    offsets = jax.ShapeDtypeStruct((S + 1,), jnp.int32)

    def to_dense(x, offsets, L=L):
      return api.jagged_to_dense(x, offsets, L, implementation="triton")

    def to_jagged(y, offsets, T=T):
      return api.dense_to_jagged(y, offsets, T, implementation="triton")

    for op, fn, a, b in (("jagged_to_dense", to_dense, x, y), ("dense_to_jagged", to_jagged, y, x)):

      def gradient(a, offsets, db, fn=fn):
        return jax.vjp(lambda a: fn(a, offsets), a)[1](db)

      common = {"op": "jagged_dense", "implementation": "triton", "shape": f"{op}_{shape}"}
      yield Case(
        **common,
        direction="forward",
        fn=fn,
        args=(a, offsets),
        kernels={f"{op}_forward": False},
      )
      yield Case(
        **common,
        direction="backward",
        fn=gradient,
        args=(a, offsets, b),
        kernels={f"{op}_backward": False},
      )
