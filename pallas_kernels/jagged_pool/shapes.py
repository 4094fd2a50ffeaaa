"""Shapes at which pooling is compiled and timed."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import LENGTHS, Case
from pallas_kernels.jagged_pool import api

# Segments, rows, width, dtype: programs.
PROGRAMS = {
  "zipf_mean100_w128": (4_096, 409_600, 128, jnp.bfloat16),
  "length512_w256_float32": (256, 131_072, 256, jnp.float32),
  "many_short_w16": (65_536, 262_144, 16, jnp.float16),
  "one_long_w96": (12, 16_384, 96, jnp.bfloat16),
}
# Lengths of segments, and the length they are padded to by those who pad.
TIMED = {
  "half_padded_w128": (np.linspace(256, 768, 24).astype(np.int32), 1_024),
  "zipf_mean100_w128": (LENGTHS["zipf"], int(LENGTHS["zipf"].max())),
}
TIMED_WIDTH = 128
LAST = 64  # Rows kept by mode "last".
KERNELS = {
  "sum": (["jagged_pool_forward", "jagged_pool_forward_rest"], ["jagged_pool_backward"]),
  "mean": (["jagged_pool_forward", "jagged_pool_forward_rest"], ["jagged_pool_backward"]),
  "max": (
    ["jagged_pool_max_forward", "jagged_pool_max_forward_rest"],
    # The program of the gradient finds the largest rows first.
    ["jagged_pool_max_forward", "jagged_pool_max_forward_rest", "jagged_pool_max_backward"],
  ),
  "last": (["jagged_pool_last_forward"], ["jagged_pool_last_backward"]),
}


def report_cases() -> Iterator[Case]:
  """Every mode at every shape, forward and backward."""
  for shape, (S, T, W, dtype) in PROGRAMS.items():
    x, offsets = jax.ShapeDtypeStruct((T, W), dtype), jax.ShapeDtypeStruct((S + 1,), jnp.int32)
    for mode, (forward, backward) in KERNELS.items():
      k = LAST if mode == "last" else None

      def pool(x, offsets, mode=mode, k=k):
        return api.jagged_pool(x, offsets, mode=mode, k=k, implementation="triton")

      def gradient(x, offsets, dy, pool=pool):
        return jax.vjp(lambda x: pool(x, offsets), x)[1](dy)

      common = {"op": "jagged_pool", "implementation": "triton", "shape": f"{mode}_{shape}"}
      kernels = dict.fromkeys(forward, False)
      yield Case(**common, direction="forward", fn=pool, args=(x, offsets), kernels=kernels)
      dy = jax.ShapeDtypeStruct((S, W) if k is None else (S, k, W), dtype)
      args, kernels = (x, offsets, dy), dict.fromkeys(backward, False)
      yield Case(**common, direction="backward", fn=gradient, args=args, kernels=kernels)
