"""A multi-layer perceptron: ReLU after every hidden layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gemjax.layers.dropout import Key, dropout, fold
from gemjax.layers.linear import Linear


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
  """max(x, 0), whose gradient is told from its output. Behind no barrier XLA would tell it from x:
  then cuBLAS writes x, and max(x, 0) is a pass of its own.
  """
  return jax.nn.relu(x)


def _relu_forward(x):
  y = jax.lax.optimization_barrier(jax.nn.relu(x))
  return y, y


def _relu_backward(y, gradient):
  return (jnp.where(y > 0, gradient, 0),)


relu.defvjp(_relu_forward, _relu_backward)


class Mlp(nnx.Module):
  """x_BI -> x_BO: h <- dropout(relu(h W_i + b_i)) for the hidden widths, then h W + b, the last
  one computed in `last_dtype` where given. `norm` lies between a hidden layer's map and its ReLU;
  with `float8` all products are of 8 bits.

  Kernels are born with variance 1 / fan-in (LeCun), biases at zero.
  """

  def __init__(
    self,
    inputs: int,
    hidden: tuple[int, ...],
    outputs: int,
    *,
    dtype: str,
    rngs: nnx.Rngs,
    dropout: float = 0.0,
    last_dtype: str | None = None,
    norm: Callable[[int], nnx.Module] | None = None,
    float8: bool = False,
  ):
    widths = (inputs, *hidden, outputs)
    dtypes = [dtype] * len(hidden) + [last_dtype or dtype]
    self.dropout, self.float8 = dropout, float8
    self.layers = nnx.List(
      [
        Linear(i, o, dtype=t, rngs=rngs, float8=float8)
        for (i, o), t in zip(itertools.pairwise(widths), dtypes)
      ]
    )
    self.norms = nnx.List([norm(width) for width in hidden] if norm else [])

  @jax.named_scope("mlp")
  def __call__(
    self, x_BI: jax.Array, key_B: Key = None, outer: int = 0, columns: int = 0
  ) -> jax.Array:
    """`outer` is of the inputs, `columns` of the outputs, as a `Linear` has them."""
    if len(self.layers) == 1:
      return self.layers[0](x_BI, outer, columns)
    return self.layers[-1](self.hidden(x_BI, key_B, outer), columns=columns)

  def hidden(self, x_BI: jax.Array, key_B: Key = None, outer: int = 0) -> jax.Array:
    """What the last layer reads: x itself where no layer is hidden."""
    return self._activated(self.layers[0](x_BI, outer), key_B) if len(self.layers) > 1 else x_BI

  @jax.named_scope("mlp")
  def behind(self, h_BH: jax.Array, key_B: Key = None) -> jax.Array:
    """(B, O), from what the first layer gives."""
    return self.layers[-1](self._activated(h_BH, key_B)) if len(self.layers) > 1 else h_BH

  def _activated(self, h: jax.Array, key_B: Key) -> jax.Array:
    # The next map keeps what it reads for its own gradient: the ReLU's output, or else a mask is
    # less to keep than that.
    activate = jax.nn.relu if self.dropout or self.float8 else relu
    for i, layer in enumerate(self.layers[:-1]):
      h = layer(h) if i else h
      h = self.norms[i](h) if self.norms else h
      h = dropout(activate(h), self.dropout, fold(key_B, i))
    return h
