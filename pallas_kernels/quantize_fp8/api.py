"""Activations kept in 8 bits until the backward pass: values and their scales."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import noise
from pallas_kernels.dispatch import dispatch
from pallas_kernels.quantize_fp8 import form, layout, reference, triton, xla
from pallas_kernels.quantize_fp8.layout import Granularity

OP = "quantize_fp8"
INPUTS = (jnp.float32, jnp.bfloat16, jnp.float16)


def quantize_fp8(
  x: jax.Array,
  *,
  granularity: Granularity = "tensor",
  dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn,
  key: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """x as 8-bit floats times a scale for each group.

      scale = the smallest power of two >= 2^-126 with max |x| / scale <= largest of dtype; 1 for 0
      values = round(x / scale)                                  x = values scale, nearly

  Powers of two, so the division is exact and the one rounding is that to `dtype`; a float loses
  nothing by it but at most one of its 17 (e4m3fn) or 31 (e5m2) octaves. Nothing finite saturates.

  With a key the rounding is stochastic: |x| / scale goes to one of its two neighbours with
  E[values scale] = x up to 2^-31 of their distance; the noise depends on the key and the element's
  place alone (`pallas_kernels/noise.py`), so that all implementations give the same bits. Without
  one it is to nearest, ties to even.

  NaN stays NaN. An infinity stays one in e5m2 and becomes NaN in e4m3fn, which has none; neither
  counts for the scale, so that the rest of the group survives. Subnormal float32 count as zero.

  It has no gradient, being for what is saved in a forward pass: differentiating it is a TypeError.
  Put it into the forward rule of a `jax.custom_vjp`, or `jax.lax.stop_gradient` around x.

  Args:
    x: float32, bfloat16 or float16, any shape.
    granularity: "tensor", one scale; "row", one for each x[..., :]; "block", one for each
      32 x 32 of the last two axes, smaller at their ends.
    dtype: float8_e4m3fn (3 bits of mantissa, to 448) or float8_e5m2 (2 bits, to 57,344).
    key: A `jax.random.key` for stochastic rounding.
    implementation: See `pallas_kernels.dispatch`.

  Returns:
    (values of dtype and the shape of x, scales float32 of shape (), x.shape[:-1] or
    (..., ceil(M / 32), ceil(K / 32))).

  Raises:
    ValueError: Another granularity or dtype, or a shape that has no such groups.

  Source: Micikevicius et al. 2022 (FP8 formats); OCP Microscaling 1.0 for scales of powers of two,
  which saturates where ours takes the next scale.
  """
  x, dtype = jnp.asarray(x), jnp.dtype(dtype)
  _check(x, granularity, dtype)
  words = None if key is None else noise.words_of(OP, key)
  if not x.size:
    return jnp.zeros(x.shape, dtype), jnp.ones(layout.scale_shape(x.shape, granularity))
  return _quantize(granularity, dtype, implementation, x, words)


def dequantize_fp8(
  values: jax.Array, scales: jax.Array, *, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
  """values scale, the inverse of `quantize_fp8` but for its rounding.

  Plain JAX on every device: XLA fuses it into what reads the result.

  Args:
    values: float8_e4m3fn or float8_e5m2.
    scales: float32 as `quantize_fp8` returns them; their shape tells the granularity.
    dtype: Of the result, rounded once from the exact product; what was rounded up beyond its
      largest number becomes that. Infinities and NaN stay.

  Raises:
    ValueError: Other dtypes, or scales of a shape that no granularity has.
  """
  granularity = layout.granularity_of(values.shape, scales.shape)
  if values.dtype not in form.DTYPES or scales.dtype != jnp.float32 or granularity is None:
    raise ValueError(
      "dequantize_fp8: values and scales must be what quantize_fp8 returns, are "
      f"{values.dtype} of shape {values.shape} and {scales.dtype} of shape {scales.shape}"
    )
  x = values.astype(jnp.float32)
  largest = jnp.float32(jnp.finfo(dtype).max)
  product = x * layout.spread(scales, values.shape)
  within = jax.lax.clamp(-largest, product, largest)
  return jax.lax.select(jnp.isfinite(x), within, product).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _quantize(granularity, dtype, implementation, x, words):
  modules = {"reference": reference, "xla": xla, "triton": triton}
  bound = {n: functools.partial(m.quantize, granularity, dtype) for n, m in modules.items()}
  refusal = None
  if x.size > 2**31 - 1:  # Pallas counts the bytes of up to 4 GiB in int32.
    refusal = f"its kernel takes at most 2^31 - 1 elements, and x has {x.size}"
  return dispatch(OP, implementation, bound, x, words, refusal=refusal)


@_quantize.defjvp
def _no_gradient(granularity, dtype, implementation, primals, tangents):
  raise TypeError(f"{OP} has no gradient: use it in a custom_vjp's forward rule, or stop_gradient")


def _check(x: jax.Array, granularity: str, dtype) -> None:
  if x.dtype not in INPUTS:
    raise ValueError(f"{OP}: x must be float32, bfloat16 or float16, is {x.dtype}")
  if granularity not in layout.GRANULARITIES:
    raise ValueError(f"{OP}: granularity {granularity!r} is not one of tensor, row, block")
  if dtype not in form.DTYPES:
    raise ValueError(f"{OP}: dtype must be float8_e4m3fn or float8_e5m2, is {dtype}")
  axes = {"tensor": 0, "row": 1, "block": 2}[granularity]
  if x.ndim < axes:
    raise ValueError(
      f"{OP}: granularity {granularity!r} needs {axes} axes or more, x is of shape {x.shape}"
    )
