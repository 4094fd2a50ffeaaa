"""Shapes at which jagged_matmul is compiled, and lengths at which it is timed."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, zipf_lengths
from pallas_kernels.jagged_matmul import api

# Segments, rows, widths in and out, dtype: one example of InterFormer is one segment.
PROGRAMS = {
  "interformer_w64": (2_048, 204_800, 64, 64, jnp.bfloat16),
  "interformer_w128": (2_048, 204_800, 128, 128, jnp.bfloat16),
  "interformer_w256": (1_024, 512_000, 256, 256, jnp.bfloat16),
  "interformer_w128_fp16": (2_048, 204_800, 128, 128, jnp.float16),
  "short_w32": (4_096, 40_960, 32, 32, jnp.bfloat16),
  "odd_w80_to_w200": (512, 51_200, 80, 200, jnp.bfloat16),
  "odd_w33_to_w65": (512, 51_200, 33, 65, jnp.bfloat16),
  "interformer_w32_f32": (2_048, 204_800, 32, 32, jnp.float32),
  "interformer_w64_f32": (2_048, 204_800, 64, 64, jnp.float32),
  "interformer_w256_f32": (1_024, 512_000, 256, 256, jnp.float32),
  "odd_w80_to_w200_f32": (512, 51_200, 80, 200, jnp.float32),
  "odd_w33_to_w65_f32": (512, 51_200, 33, 65, jnp.float32),
}
# Lengths of segments, and width.
TIMED = {
  "to_20_w64": (np.random.default_rng(0).integers(0, 21, 512).astype(np.int32), 64),
  "to_100_w32": (np.random.default_rng(1).integers(0, 101, 256).astype(np.int32), 32),
  "to_100_w64": (np.random.default_rng(1).integers(0, 101, 256).astype(np.int32), 64),
  "zipf_mean100_w64": (zipf_lengths(total=12_800, segments=128, seed=2), 64),
}
KERNELS = {
  "forward": ("jagged_matmul_forward",),
  "backward": ("jagged_matmul_backward_rows", "jagged_matmul_backward_matrices"),
}


def forward(x_TK, w_SKN, offsets_S1):
  """The kernel, compiled."""
  return api.jagged_matmul(x_TK, w_SKN, offsets_S1, implementation="triton")


def backward(x_TK, w_SKN, offsets_S1, dy_TN):
  """The kernels of the gradients, compiled."""
  return jax.vjp(lambda x, w: forward(x, w, offsets_S1), x_TK, w_SKN)[1](dy_TN)


def report_cases() -> Iterator[Case]:
  """All kernels at every shape."""
  for shape, (S, T, K, N, dtype) in PROGRAMS.items():
    x, w, dy = (jax.ShapeDtypeStruct(s, dtype) for s in ((T, K), (S, K, N), (T, N)))
    args = (x, w, jax.ShapeDtypeStruct((S + 1,), jnp.int32))
    for direction, fn in (("forward", forward), ("backward", backward)):
      yield Case(
        op="jagged_matmul",
        implementation="triton",
        direction=direction,
        shape=shape,
        fn=fn,
        args=args if direction == "forward" else (*args, dy),
        kernels=dict.fromkeys(KERNELS[direction], True),
      )
