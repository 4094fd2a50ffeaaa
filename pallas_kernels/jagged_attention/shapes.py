"""Named shapes of jagged_attention: what is compiled for GPUs, and what is timed.

A mask is an interval of keys and no case of a kernel, so programs differ by width, dtype,
activation and biases alone; lengths do not matter to a compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, zipf_lengths
from pallas_kernels.jagged_attention import mosaic_shapes, triton
from pallas_kernels.jagged_attention.bias import Buckets
from pallas_kernels.jagged_attention.form import Form, Plan, Saved

ROWS, HEADS, SEGMENTS = 4_096, 4, 32
POSITION, TIME = Buckets(bits=3), Buckets(bits=1)
BUCKETS = (104, 64)  # Positions up to 65,536 and distances in seconds up to 136 years.

# Name: (width, dtype, activation, whether it has position and time biases).
COMPILED = {
  f"w{width}_{short}_{activation}{'_biases' * biased}": (width, dtype, activation, biased)
  for width, short, dtype, activation, biased in (
    *(
      (w, "bf16", "bfloat16", a, biased)
      for w in (32, 64, 128, 256)
      for a in ("softmax", "silu")
      for biased in (False, True)
    ),
    *((w, "bf16", "bfloat16", a, False) for w in (64, 128) for a in ("gelu", "relu2")),
    *((w, "fp16", "float16", "softmax", False) for w in (64, 128)),
    *((w, "f32", "float32", "silu", False) for w in (32, 64, 128, 256)),
    *((w, "f32", "float32", "softmax", True) for w in (8, 16)),  # As small models have it.
    (96, "bf16", "bfloat16", "softmax", False),
    (80, "bf16", "bfloat16", "silu", False),
  )
}  # fmt: skip


def report_cases() -> Iterator[Case]:
  """Both directions of every program, and the Mosaic kernels."""
  for shape, (width, dtype, activation, biased) in COMPILED.items():
    array = jax.ShapeDtypeStruct
    x_THD = array((ROWS, HEADS, width), dtype)
    offset_S1, x_T = array((SEGMENTS + 1,), jnp.int32), array((ROWS,), jnp.int32)
    gain_T = array((ROWS,), jnp.float32)
    count = 2 if biased else 0
    plan = Plan(offset_S1, offset_S1, x_T, x_T, gain_T, (x_T,) * count, (x_T,) * count)
    tables = tuple(array((HEADS, n), jnp.float32) for n in BUCKETS[:count])
    scale = width**-0.5 if activation == "softmax" else 1.0
    form = Form(activation, scale, (POSITION, TIME)[:count])
    saved = Saved(x_THD, array((ROWS, HEADS) if form.softmax else (0, 0), jnp.float32))
    args = (x_THD, x_THD, x_THD, tables, plan)
    common = {"op": "jagged_attention", "implementation": "triton", "shape": shape}
    yield Case(
      **common,
      direction="forward",
      fn=functools.partial(triton.forward, form, interpret=False),
      args=args,
      kernels={"jagged_attention_forward": True},
    )
    yield Case(
      **common,
      direction="backward",
      fn=functools.partial(triton.backward, form, interpret=False),
      args=(*args, saved, x_THD),
      kernels={"jagged_attention_backward_queries": True, "jagged_attention_backward_keys": True},
    )
  yield from mosaic_shapes.report_cases()


def lengths(name: str, quick: bool) -> np.ndarray:
  """Lengths of the named set, an eighth of the segments where quick."""
  rng = np.random.default_rng(0)
  count = 4 if quick else 32
  match name:
    case "half_padded":  # Up to 512 events, 256 in the mean.
      return np.linspace(0, 512, count).round().astype(np.int32)
    case "all_256":
      return np.full(count, 256, np.int32)
    case "from_256_to_2048":
      return rng.integers(256, 2_049, count // 4).astype(np.int32)
    case "zipf_mean100":
      return zipf_lengths(total=100 * count, segments=count, seed=1)
  raise KeyError(name)


# Name: (lengths, options).
TIMED = {
  "half_padded_softmax": ("half_padded", {}),
  "half_padded_hstu": ("half_padded", {"activation": "silu", "causal": True, "norm": 512}),
  "half_padded_blocks_of_64": ("half_padded", {"block": 64}),
  "half_padded_window_128": ("half_padded", {"window": 128, "causal": True}),
  "all_256_softmax": ("all_256", {}),
  "all_256_hstu": ("all_256", {"activation": "silu", "causal": True, "norm": 256}),
  "from_256_to_2048_softmax": ("from_256_to_2048", {}),
  "from_256_to_2048_hstu": (
    "from_256_to_2048",
    {"activation": "silu", "causal": True, "norm": 2_048},
  ),
  "zipf_mean100_softmax": ("zipf_mean100", {}),
  "zipf_mean100_hstu": ("zipf_mean100", {"activation": "silu", "causal": True, "norm": 512}),
}
QUICK = ("half_padded_softmax", "zipf_mean100_hstu")
TIMED_HEADS, TIMED_WIDTH = 2, 64
