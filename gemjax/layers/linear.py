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

  def __call__(self, x_BI: jax.Array) -> jax.Array:
    kernel = self.kernel[...]
    y_BO = contract("bi,io->bo", x_BI, kernel, self.inputs, self.dtype, float8=self.float8)
    return y_BO + rearrange(self.bias[...].astype(self.dtype), "o -> 1 o")


def contract(
  equation: str,
  x: jax.Array,
  kernel: jax.Array,
  inputs: int,
  dtype: str,
  *,
  float8: bool = False,
) -> jax.Array:
  """einsum(equation, x, W) in `dtype`, where W is the whole kernel.

  Args:
    equation: Of two operands.
    x: Activations.
    kernel: W, or this device's rows of it in the order of the `model` axis.
    inputs: Rows of W.
    dtype: W is cast to it before it is gathered: what the product needs, in half the bytes.
    float8: Whether x and W are multiplied in 8 bits (gemjax/layers/float8.py).
  """
  x = x.astype(dtype)
  if kernel.shape[0] == inputs:
    return _product(float8)(equation, x, kernel.astype(dtype))
  return _contract_shard(equation, dtype, float8, x, kernel)


def _product(in_8_bits: bool):
  return float8_lib.einsum if in_8_bits else jnp.einsum


# Differentiated as it stands, the product would keep the gathered W of every layer for the backward
# pass, which is what sharding shall save. `jax.checkpoint` would gather again, but hold the gather
# back until the gradient of the output is there; here it may run ahead, beside other work. Outside
# of loops over layers XLA sees that both gathers are one, and keeps that W: of the first layer and
# the heads, which are a small part of all and would wait for it.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _contract_shard(equation, dtype, float8, x, shard):
  return _product(float8)(equation, x, _gather(shard, dtype))


def _forward(equation, dtype, float8, x, shard):
  if not float8:
    return _contract_shard(equation, dtype, float8, x, shard), (x, shard)
  x8, kernel8 = float8_lib.rounded(x), float8_lib.rounded(_gather(shard, dtype))
  return float8_lib.product(equation, x8, kernel8, dtype), (x8, shard)


def _backward(equation, dtype, float8, kept, gradient):
  x, shard = kept
  kernel = _gather(shard, dtype)
  if float8:
    of_x, of_kernel = float8_lib.gradients(equation, x, float8_lib.rounded(kernel), gradient)
    return of_x, *jax.linear_transpose(lambda s: _gather(s, dtype), shard)(of_kernel)
  of_x = jax.linear_transpose(lambda x: jnp.einsum(equation, x, kernel), x)
  of_shard = jax.linear_transpose(lambda s: jnp.einsum(equation, x, _gather(s, dtype)), shard)
  return *of_x(gradient), *of_shard(gradient)


_contract_shard.defvjp(_forward, _backward)


def _gather(shard: jax.Array, dtype: str) -> jax.Array:
  """The whole kernel; the transpose sums gradients over `model` and keeps this device's rows."""
  return jax.lax.all_gather(shard.astype(dtype), MODEL, axis=0, tiled=True)
