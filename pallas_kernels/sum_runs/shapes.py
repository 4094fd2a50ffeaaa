"""Named shapes of the sums of runs, and their programs for the report of compilers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case
from pallas_kernels.rowwise_adagrad.shapes import Shape
from pallas_kernels.run_tiles import level_entries
from pallas_kernels.sum_runs import triton
from pallas_kernels.sum_runs.api import sum_runs

SHAPES = {
  "uniform_w64": Shape(1_000_000, 64, 65_536),
  "zipf_w64": Shape(1_000_000, 64, 65_536, "zipf"),
  "one_id_w64": Shape(1_000_000, 64, 65_536, "one"),
  "zipf_w160_bf16": Shape(1_000_000, 160, 65_536, "zipf", "bfloat16"),
}
# What only compilers see: the gradients of a device of the paper's Wukong, the widest and least.
REPORTED = SHAPES | {
  "paper_w160_bf16": dataclasses.replace(SHAPES["zipf_w160_bf16"], gradients=1_474_560),
  "w1024": Shape(100_000, 1_024, 10_000),
  "w1": Shape(1_000_000, 1, 100),
}


def report_cases() -> Iterator[Case]:
  """The sums of every named shape; there is no backward pass."""
  for name, shape in REPORTED.items():
    levels = range(len(level_entries(shape.gradients)))
    yield Case(
      op="sum_runs",
      implementation="triton",
      direction="forward",
      shape=name,
      fn=lambda x, order, segment: sum_runs(
        x, order, segment, count=len(order), implementation="triton"
      ),
      args=arguments(shape),
      kernels={triton.kernel_name(level): False for level in levels},
    )


def arguments(shape: Shape) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Summands, order and segment."""
  S, N = jax.ShapeDtypeStruct, (shape.gradients,)
  return S((*N, shape.width), jnp.dtype(shape.dtype)), S(N, jnp.int32), S(N, jnp.int32)
