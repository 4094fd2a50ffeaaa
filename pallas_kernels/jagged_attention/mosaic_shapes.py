"""Named shapes of the Mosaic kernels, which the report compiles."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case
from pallas_kernels.jagged_attention import mosaic, mosaic_backward
from pallas_kernels.jagged_attention.form import Form, Plan, Saved

ROWS, HEADS, SEGMENTS = 4_096, 4, 32

# Name: (width, dtype, activation).
COMPILED = {
  f"w{width}_{short}_{activation}": (width, dtype, activation)
  for width, short, dtype, activation in (
    *((w, "bf16", "bfloat16", a) for w in mosaic.WIDTHS for a in ("softmax", "silu")),
    *((128, "bf16", "bfloat16", a) for a in ("gelu", "relu2")),
    *((w, "fp16", "float16", "softmax") for w in mosaic.WIDTHS),
    (128, "fp16", "float16", "silu"),
  )
}


def arguments(width: int, dtype: str):
  """(q, k, v, tables, plan) as ShapeDtypeStructs."""
  x_THD = jax.ShapeDtypeStruct((ROWS, HEADS, width), dtype)
  offsets_S1, x_T = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (SEGMENTS + 1, ROWS))
  gain_T = jax.ShapeDtypeStruct((ROWS,), jnp.float32)
  return x_THD, x_THD, x_THD, (), Plan(offsets_S1, offsets_S1, x_T, x_T, gain_T, (), ())


def report_cases() -> Iterator[Case]:
  """The forward pass, and the backward pass of the widths that have one."""
  for shape, (width, dtype, activation) in COMPILED.items():
    form = Form(activation, width**-0.5 if activation == "softmax" else 1.0)
    args = arguments(width, dtype)
    common = {"op": "jagged_attention", "implementation": "mosaic", "shape": shape}
    yield Case(
      **common,
      direction="forward",
      fn=functools.partial(mosaic.forward, form, interpret=False),
      args=args,
      kernels={mosaic.KERNEL: True},
    )
    if mosaic_backward.serves(form, args[0]):
      log_TH = jax.ShapeDtypeStruct((ROWS, HEADS) if form.softmax else (0, 0), jnp.float32)
      yield Case(
        **common,
        direction="backward",
        fn=functools.partial(mosaic_backward.backward, form, interpret=False),
        args=(*args, Saved(args[0], log_TH), args[0]),
        kernels=dict.fromkeys(mosaic_backward.KERNELS, True),
      )
