"""Named shapes of the Mosaic kernel, which the report compiles."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case
from pallas_kernels.jagged_attention import mosaic
from pallas_kernels.jagged_attention.form import Form, Plan

ROWS, HEADS, SEGMENTS = 4_096, 4, 32

# Name: (width, dtype, activation).
COMPILED = {
  f"w{width}_{short}_{activation}": (width, dtype, activation)
  for width, short, dtype, activation in (
    *((w, "bf16", "bfloat16", a) for w in mosaic.WIDTHS for a in ("softmax", "silu")),
    *((128, "bf16", "bfloat16", a) for a in ("gelu", "relu2")),
    *((w, "fp16", "float16", "softmax") for w in (128, 256)),
  )
}


def arguments(width: int, dtype: str):
  """(q, k, v, tables, plan) as ShapeDtypeStructs."""
  x_THD = jax.ShapeDtypeStruct((ROWS, HEADS, width), dtype)
  offsets_S1, x_T = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (SEGMENTS + 1, ROWS))
  gain_T = jax.ShapeDtypeStruct((ROWS,), jnp.float32)
  return x_THD, x_THD, x_THD, (), Plan(offsets_S1, offsets_S1, x_T, x_T, gain_T, (), ())


def report_cases() -> Iterator[Case]:
  """The forward pass; there is no other in Mosaic."""
  for shape, (width, dtype, activation) in COMPILED.items():
    form = Form(activation, width**-0.5 if activation == "softmax" else 1.0)
    yield Case(
      op="jagged_attention",
      implementation="mosaic",
      direction="forward",
      shape=shape,
      fn=functools.partial(mosaic.forward, form, interpret=False),
      args=arguments(width, dtype),
      kernels={mosaic.KERNEL: True},
    )
