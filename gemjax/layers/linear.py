"""Linear maps whose kernel may be a shard, gathered where it is used.

A step runs inside `jax.shard_map`, where a layer sees either its whole kernel or this device's
part of the rows; gemjax/parallel/placement.py decides which.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax.config import MODEL
from gemjax.layers import float8 as float8_lib

# Logical axes of every kernel, the first of them the one that is summed over.
KERNEL = ("fan_in", "fan_out")
UNTURNED = (0, 0)
kernel_init = nnx.initializers.lecun_normal(in_axis=0, out_axis=1)


class Linear(nnx.Module):
  """x_BI -> x_BI W + b, (B, O), computed in `dtype`, with `float8` the product in 8 bits.

  Parameters are float32; W is born with variance 1 / I (LeCun), b at zero.
  """

  def __init__(
    self, inputs: int, outputs: int, *, dtype: str, rngs: nnx.Rngs, float8: bool = False
  ):
    self.kernel = nnx.Param(kernel_init(rngs.params(), (inputs, outputs)), axes=KERNEL)
    rngs.params()  # Of the bias, as in nnx.Linear: later weights keep the values they had with it.
    self.bias = nnx.Param(jnp.zeros((outputs,)), axes=("fan_out",))
    self.inputs, self.dtype, self.float8 = inputs, dtype, float8

  def __call__(self, x_BI: jax.Array, outer: int = 0, columns: int = 0) -> jax.Array:
    """On a CPU the inputs lie (k outer) where W's rows lie (outer k), and the outputs (k columns)
    where W's columns lie (columns k), unless 0.
    """
    kernel, bias = self.kernel[...], on_cpu_inner_first(self.bias[...], columns)
    more = {"float8": self.float8, "turned": (outer, columns)}
    y_BO = contract("bi,io->bo", x_BI, kernel, self.inputs, self.dtype, **more)
    return y_BO + rearrange(bias.astype(self.dtype), "o -> 1 o")

  def whole(self) -> jax.Array:
    """W, (I, O) in `dtype`; of a small kernel: what follows from it is kept for its gradient."""
    kernel = self.kernel[...]
    return _whole((kernel,), self.dtype, UNTURNED, kernel.shape[0] != self.inputs)


def contract(
  equation: str,
  x: jax.Array,
  kernel: jax.Array | tuple[jax.Array, ...],
  inputs: int,
  dtype: str,
  *,
  float8: bool = False,
  turned: tuple[int, int] = UNTURNED,
) -> jax.Array:
  """einsum(equation, x, W) in `dtype`, where W is the whole kernel.

  Args:
    equation: Of two operands.
    x: Activations.
    kernel: W, or this device's rows of it in the order of the `model` axis; of several matrices
      the columns side by side.
    inputs: Rows of W.
    dtype: W is cast to it before it is gathered: what the product needs, in half the bytes.
    float8: Whether x and W are multiplied in 8 bits (gemjax/layers/float8.py).
    turned: (outer, columns): where not 0, W's rows, (outer k), are taken in the order (k outer) on
      a CPU, and its columns, (columns k), in the order (k columns).
  """
  kernels = kernel if isinstance(kernel, tuple) else (kernel,)
  sharded = kernels[0].shape[0] != inputs
  if not (sharded or any(turned) or float8 or len(kernels) > 1):
    return jnp.einsum(equation, x.astype(dtype), kernels[0].astype(dtype))
  return _contract(equation, dtype, float8, turned, sharded, x.astype(dtype), kernels)


def side_by_side(kernels: tuple[jax.Array, ...], dtype: str) -> jax.Array:
  """One matrix of the columns of all."""
  return jnp.concatenate([kernel.astype(dtype) for kernel in kernels], 1)


def on_cpu_inner_first(w: jax.Array, outer: int, axis: int = 0) -> jax.Array:
  """w, on a CPU with its axis, (outer k), in the order (k outer); w where `outer` is 0."""
  if not outer:
    return w
  lead = " ".join("abc"[:axis])
  turned = lambda w: rearrange(w, f"{lead} (o k) ... -> {lead} (k o) ...", o=outer)
  return jax.lax.platform_dependent(w, cpu=turned, default=lambda w: w)


# Differentiated as it stands, the product would keep W of every layer, gathered, cast and in order,
# for the backward pass: what sharding shall save. `jax.checkpoint` would gather again, but hold the
# gather back until the gradient of the output is there; here it may run ahead, beside other work.
# Outside of loops over layers XLA sees that both gathers are one, and keeps that W: of the first
# layer and the heads, which are a small part of all and would wait for it.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _contract(equation, dtype, float8, turned, sharded, x, kernels):
  kernel = _whole(kernels, dtype, turned, sharded)
  if not float8:
    return jnp.einsum(equation, x, kernel)
  return float8_lib.product(equation, float8_lib.rounded(x), float8_lib.rounded(kernel), dtype)


def _forward(equation, dtype, float8, turned, sharded, x, kernels):
  if not float8:
    return _contract(equation, dtype, float8, turned, sharded, x, kernels), (x, kernels)
  x8 = float8_lib.rounded(x)
  kernel8 = float8_lib.rounded(_whole(kernels, dtype, turned, sharded))
  return float8_lib.product(equation, x8, kernel8, dtype), (x8, kernels)


def _backward(equation, dtype, float8, turned, sharded, kept, gradient):
  x, kernels = kept
  whole = lambda kernels: _whole(kernels, dtype, turned, sharded)
  kernel = whole(kernels)
  if float8:
    of_x, of_kernel = float8_lib.gradients(equation, x, float8_lib.rounded(kernel), gradient)
    return of_x, *jax.linear_transpose(whole, kernels)(of_kernel)
  of_x = jax.linear_transpose(lambda x: jnp.einsum(equation, x, kernel), x)
  of_kernels = jax.linear_transpose(lambda k: jnp.einsum(equation, x, whole(k)), kernels)
  return *of_x(gradient), *of_kernels(gradient)


_contract.defvjp(_forward, _backward)


def _whole(
  kernels: tuple[jax.Array, ...], dtype: str, turned: tuple[int, int], sharded: bool
) -> jax.Array:
  """The whole kernel; of shards the transpose sums gradients over `model` and keeps this device's
  rows.
  """
  kernel = side_by_side(kernels, dtype)
  if sharded:
    kernel = jax.lax.all_gather(kernel, MODEL, axis=0, tiled=True)
  for axis, outer in enumerate(turned):
    kernel = on_cpu_inner_first(kernel, outer, axis)
  return kernel
