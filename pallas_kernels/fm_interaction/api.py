"""fm_interaction: the public function, its laws and its gradient.

Letters: B examples, N units, D width of a unit, K rank, F = N * K features.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch
from pallas_kernels.fm_interaction import reference, triton, xla
from pallas_kernels.fm_interaction.tiling import refusal

FLOATS = ("bfloat16", "float16", "float32", "float64")


def fm_interaction(
  x_BND: jax.Array,
  y: jax.Array,
  scale_F: jax.Array | None = None,
  bias_F: jax.Array | None = None,
  *,
  eps: float = 1e-6,
  implementation: str | None = None,
) -> jax.Array:
  """Products of every unit with K mixtures of units, normalised over the example.

    p = flatten(X (Xᵀ Y))                                 of each example, (F,), F = N * K
    out = (p - mean(p)) / sqrt(var(p) + eps) * scale + bias

  Products are of x's dtype with sums in float32 (float32 itself in TF32 on a GPU, as XLA does);
  mean, biased variance and the normalisation are float32. Nothing is kept for the backward pass
  but the inputs. The kernels hold Xᵀ Y and the products of one example at a time, in registers or
  in scratch pages of a fixed number of programs (about 32 MiB, up to 300 for the largest sizes of
  the paper): no (B, K, D) and no (B, N * K) before the norm. Gradients of what examples share are
  sums in an order that does not vary: the same bits in every run.

  Args:
    x_BND: Units, of any float dtype; B may be 0.
    y: (N, K) shared by all examples, or (B, N, K); any float dtype, multiplied in x's.
    scale_F: (N * K,) learnt scale, or None for 1.
    bias_F: (N * K,) learnt bias, or None for 0.
    eps: Added to the variance.
    implementation: None leaves the choice to `pallas_kernels.dispatch`.

  Returns:
    out_BF (B, N * K) of x's dtype; its element n * K + k belongs to unit n and mixture k.

  Raises:
    ValueError: Shapes or dtypes that do not fit; a forced kernel that refuses.

  Source: Wukong, arXiv 2403.02545, section 3.4 (optimised and attentive FM, and the norm in FMB).
  """
  x_BND, y = jnp.asarray(x_BND), jnp.asarray(y)
  scale_F, bias_F = (None if a is None else jnp.asarray(a) for a in (scale_F, bias_F))
  _check(x_BND, y, scale_F, bias_F, eps)
  if not x_BND.shape[0]:
    return jnp.zeros((0, y.shape[-2] * y.shape[-1]), x_BND.dtype)
  return _fm(eps, implementation, x_BND, y, scale_F, bias_F)


_MOST_PAIRS = 2_048  # N K of the kernel that the rule takes.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fm(eps, implementation, x_BND, y, scale_F, bias_F):
  return _run("forward", eps, implementation, x_BND, y, scale_F, bias_F)


def _forward(eps, implementation, *inputs):
  return _fm(eps, implementation, *inputs), inputs


def _backward(eps, implementation, inputs, gradient_BF):
  return _run("backward", eps, implementation, *inputs, gradient_BF)


_fm.defvjp(_forward, _backward)


def _run(direction, eps, implementation, x_BND, y, *rest):
  choices = {
    m.__name__.rpartition(".")[2]: functools.partial(getattr(m, direction), eps=eps)
    for m in (xla, triton, reference)
  }
  # Beyond, its pieces of X Xᵀ Y are slower than cuBLAS on an H100 (pallas_kernels.bench).
  kernel = "triton" if x_BND.shape[1] * y.shape[-1] <= _MOST_PAIRS else None
  why_not = refusal(x_BND.dtype)
  args = (x_BND, y, *rest)
  return dispatch("fm_interaction", implementation, choices, *args, refusal=why_not, kernel=kernel)


def _check(x_BND, y, scale_F, bias_F, eps):
  if x_BND.ndim != 3 or not all(x_BND.shape[1:]):
    raise ValueError(
      f"fm_interaction: x must be (B, N, D) with N and D at least 1, is {x_BND.shape}"
    )
  batch, units, _ = x_BND.shape
  shared = y.ndim == 2 and y.shape[0] == units
  own = y.ndim == 3 and y.shape[:2] == (batch, units)
  if not (shared or own) or not y.shape[-1]:
    raise ValueError(
      f"fm_interaction: y must be (N, K) or (B, N, K) with B = {batch}, N = {units} of x and K at "
      f"least 1, is {y.shape}"
    )
  features = (units * y.shape[-1],)
  for name, array, shape in (("scale", scale_F, features), ("bias", bias_F, features)):
    if array is not None and array.shape != shape:
      raise ValueError(f"fm_interaction: {name} must be (N * K,) = {shape}, is {array.shape}")
  for name, array in (("x", x_BND), ("y", y), ("scale", scale_F), ("bias", bias_F)):
    if array is not None and array.dtype.name not in FLOATS:
      raise ValueError(
        f"fm_interaction: {name} must be one of {', '.join(FLOATS)}, is {array.dtype.name}"
      )
  if not eps > 0:
    raise ValueError(f"fm_interaction: eps must be more than 0, is {eps}")
