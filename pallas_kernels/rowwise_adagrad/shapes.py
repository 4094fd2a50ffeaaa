"""Named shapes of the row-wise update, and its programs for the report of compilers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import run_tiles
from pallas_kernels.case import Case
from pallas_kernels.rowwise_adagrad import triton
from pallas_kernels.rowwise_adagrad.api import rowwise_adagrad_update


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
  """A table, and how the ids of a batch fall on it: "uniform", "zipf" (~ 1 / rank) or "one"."""

  rows: int
  width: int
  gradients: int
  ids: str = "uniform"
  dtype: str = "float32"

  def draw(self, seed: int = 0) -> np.ndarray:
    """row_N int32."""
    rng = np.random.default_rng(seed)
    if self.ids == "one":
      return np.full((self.gradients,), self.rows // 2, np.int32)
    if self.ids == "uniform":
      return rng.integers(0, self.rows, self.gradients).astype(np.int32)
    below = np.cumsum(1 / np.arange(1, self.rows + 1))
    rank_N = np.searchsorted(below, rng.random(self.gradients) * below[-1])
    return rng.permutation(self.rows).astype(np.int32)[rank_N]


SHAPES = {
  "uniform_1m_w64": Shape(1_000_000, 64, 65_536),
  "zipf_1m_w64": Shape(1_000_000, 64, 65_536, "zipf"),
  "one_id_1m_w64": Shape(1_000_000, 64, 65_536, "one"),
}
# What only compilers see: bfloat16, which XLA for CPUs cannot gather without converting the whole
# table, a table of 51 GB, beyond int32 offsets, and the widest and least.
REPORTED = SHAPES | {
  "zipf_300k_w160_bf16": Shape(300_000, 160, 65_536, "zipf", "bfloat16"),
  "100m_w128": Shape(100_000_000, 128, 1_000_000),
  "w1024": Shape(100_000, 1_024, 10_000),
  "w1": Shape(1_000_000, 1, 100),
}


def report_cases() -> Iterator[Case]:
  """The update of every named shape; there is no backward pass."""
  for name, shape in REPORTED.items():
    noisy = shape.dtype == "bfloat16"
    yield Case(
      op="rowwise_adagrad",
      implementation="triton",
      direction="forward",
      shape=name,
      fn=functools.partial(_update, noisy=noisy),
      args=arguments(shape),
      kernels={
        triton.kernel_name(level): False
        for level in range(len(run_tiles.level_entries(shape.gradients)))
      },
    )


def arguments(shape: Shape) -> tuple[jax.ShapeDtypeStruct, ...]:
  """What the update takes, of arrays."""
  S, N = jax.ShapeDtypeStruct, (shape.gradients,)
  table_RW = S((shape.rows, shape.width), jnp.dtype(shape.dtype))
  v_R, grad_NW = S((shape.rows,), jnp.float32), S((*N, shape.width), jnp.float32)
  return table_RW, v_R, grad_NW, *(S(N, jnp.int32) for _ in range(3)), S((), jnp.float32)


def _update(table_RW, v_R, grad_NW, order_N, segment_N, unique_U, lr, *, noisy: bool):
  return rowwise_adagrad_update(
    table_RW, v_R, grad_NW, order_N, segment_N, unique_U,
    lr=lr, key=jax.random.key(0) if noisy else None, implementation="triton",
  )  # fmt: skip
