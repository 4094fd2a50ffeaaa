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

# Logical axes of every kernel, the first of them the one that is summed over.
KERNEL = ("fan_in", "fan_out")
kernel_init = nnx.initializers.lecun_normal(in_axis=0, out_axis=1)


class Linear(nnx.Module):
  """x_BI -> x_BI W + b, (B, O), computed in `dtype`.

  Parameters are float32; W is born with variance 1 / I (LeCun), b at zero.
  """

  def __init__(self, inputs: int, outputs: int, *, dtype: str, rngs: nnx.Rngs):
    self.kernel = nnx.Param(kernel_init(rngs.params(), (inputs, outputs)), axes=KERNEL)
    rngs.params()  # Of the bias, as in nnx.Linear: later weights keep the values they had with it.
    self.bias = nnx.Param(jnp.zeros((outputs,)), axes=("fan_out",))
    self.inputs, self.dtype = inputs, dtype

  def __call__(self, x_BI: jax.Array) -> jax.Array:
    y_BO = contract("bi,io->bo", x_BI, self.kernel[...], self.inputs, self.dtype)
    return y_BO + rearrange(self.bias[...].astype(self.dtype), "o -> 1 o")


def contract(equation: str, x: jax.Array, kernel: jax.Array, inputs: int, dtype: str) -> jax.Array:
  """einsum(equation, x, W) in `dtype`, where W is the whole kernel.

  Args:
    equation: Of two operands.
    x: Activations.
    kernel: W, or this device's rows of it in the order of the `model` axis.
    inputs: Rows of W.
    dtype: W is cast to it before it is gathered: what the product needs, in half the bytes.
  """
  x = x.astype(dtype)
  if kernel.shape[0] == inputs:
    return jnp.einsum(equation, x, kernel.astype(dtype))
  return _contract_shard(equation, dtype, x, kernel)


# Differentiated as it stands, the product would keep the gathered W of every layer for the backward
# pass, which is what sharding shall save. `jax.checkpoint` would gather again, but hold the gather
# back until the gradient of the output is there; here it may run ahead, beside other work.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract_shard(equation, dtype, x, shard):
  return jnp.einsum(equation, x, _gather(shard, dtype))


def _forward(equation, dtype, x, shard):
  return _contract_shard(equation, dtype, x, shard), (x, shard)


def _backward(equation, dtype, kept, gradient):
  x, shard = kept
  # Behind the barrier this is another gather than the forward one, whose result can be freed.
  kernel = _gather(jax.lax.optimization_barrier(shard), dtype)
  of_x = jax.linear_transpose(lambda x: jnp.einsum(equation, x, kernel), x)
  of_shard = jax.linear_transpose(lambda s: jnp.einsum(equation, x, _gather(s, dtype)), shard)
  return *of_x(gradient), *of_shard(gradient)


_contract_shard.defvjp(_forward, _backward)


def _gather(shard: jax.Array, dtype: str) -> jax.Array:
  """The whole kernel; the transpose sums gradients over `model` and keeps this device's rows."""
  return jax.lax.all_gather(shard.astype(dtype), MODEL, axis=0, tiled=True)
