"""Named shapes of the quantisation, and its programs for the report of compilers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case
from pallas_kernels.quantize_fp8.api import OP, quantize_fp8


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
  """Activations and how they are kept."""

  x: tuple[int, ...]
  granularity: str
  dtype: str = "float8_e4m3fn"
  stochastic: bool = False
  of: str = "bfloat16"


SHAPES = {
  "tensor_4096x1024": Shape((4_096, 1_024), "tensor"),
  "row_4096x1024": Shape((4_096, 1_024), "row"),
  "block_4096x1024": Shape((4_096, 1_024), "block"),
  "block_4096x1024_stochastic": Shape((4_096, 1_024), "block", stochastic=True),
  "row_20000x160_e5m2_stochastic": Shape((20_000, 160), "row", "float8_e5m2", stochastic=True),
}
REPORTED = SHAPES | {
  "tensor_vector_stochastic": Shape((10_000_000,), "tensor", stochastic=True),
  "row_64x16384_stochastic_f32": Shape((64, 16_384), "row", stochastic=True, of="float32"),
  "row_64x20000": Shape((64, 20_000), "row"),  # Too long for a tile: scales come before.
  "block_3x1000x500_e5m2_f32": Shape((3, 1_000, 500), "block", "float8_e5m2", of="float32"),
}


def report_cases() -> Iterator[Case]:
  """Every named shape; there is no backward pass."""
  for name, shape in REPORTED.items():
    yield Case(
      op=OP,
      implementation="triton",
      direction="forward",
      shape=name,
      fn=functools.partial(quantize, shape, "triton"),
      args=(jax.ShapeDtypeStruct(shape.x, jnp.dtype(shape.of)),),
      kernels={"quantize_fp8_forward": False},
    )


def quantize(shape: Shape, implementation: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x as the shape says."""
  key = jax.random.key(0) if shape.stochastic else None
  return quantize_fp8(
    x,
    granularity=shape.granularity,
    dtype=shape.dtype,
    key=key,
    implementation=implementation,
  )
