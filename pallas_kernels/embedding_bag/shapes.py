"""Shapes at which bags are compiled. Timed: those of `jagged_pool`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case
from pallas_kernels.embedding_bag import api

# Bags, ids, rows of the table, width, dtype. The first table has more elements than int32 counts.
PROGRAMS = {
  "zipf_mean100_w128": (4_096, 409_600, 20_000_000, 128, jnp.float32),
  "short_w64": (65_536, 262_144, 1_000_000, 64, jnp.bfloat16),
  "one_long_w160": (12, 16_384, 1_000_000, 160, jnp.float32),
}
KERNELS = {
  "forward": ["embedding_bag_forward", "embedding_bag_forward_rest"],
  "backward": ["embedding_bag_rows_backward", "embedding_bag_backward"],
}


def report_cases() -> Iterator[Case]:
  """The weighted mean at every shape, forward, and the gradients of rows and weights."""
  forward = functools.partial(api.embedding_bag, mode="mean", implementation="triton")
  backward = functools.partial(api.embedding_bag_gradients, mode="mean", implementation="triton")
  for shape, (S, N, R, W, dtype) in PROGRAMS.items():
    args = (
      jax.ShapeDtypeStruct((R, W), dtype),
      jax.ShapeDtypeStruct((N,), jnp.int32),
      jax.ShapeDtypeStruct((S + 1,), jnp.int32),
      jax.ShapeDtypeStruct((N,), jnp.float32),
    )
    dy = jax.ShapeDtypeStruct((S, W), dtype)
    for direction, fn, direction_args in (
      ("forward", forward, args),
      ("backward", backward, (dy, *args)),
    ):
      yield Case(
        op="embedding_bag",
        implementation="triton",
        direction=direction,
        shape=shape,
        fn=fn,
        args=direction_args,
        kernels=dict.fromkeys(KERNELS[direction], False),
      )
