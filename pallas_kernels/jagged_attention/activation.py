"""Activations of scores, in place of the softmax (generalised dot-product attention)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Sigmoid = Callable[[jax.Array], jax.Array]


class Activation(NamedTuple):
  """f and f' of a score, in its dtype; both are given the sigmoid that they are made of."""

  value: Callable[[jax.Array, Sigmoid], jax.Array]
  slope: Callable[[jax.Array, Sigmoid], jax.Array]


def sigmoid_by(tanh: Callable[[jax.Array], jax.Array]) -> Sigmoid:
  """1 / (1 + exp(-x)) by one tanh: GPUs have an instruction for it, where exp and 1 / x are two."""
  return lambda x: 0.5 + 0.5 * tanh(0.5 * x)


def _silu_slope(x: jax.Array, sigmoid: Sigmoid) -> jax.Array:
  gate = sigmoid(x)
  return gate * (1 + x * (1 - gate))


# x (1 + tanh(u / 2)) / 2 = x sigmoid(u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3): Hendrycks 2016.
_GELU, _CUBIC = 1.5957691216057308, 0.044715


def _gelu(x: jax.Array, sigmoid: Sigmoid) -> jax.Array:
  return x * sigmoid(_GELU * x * (1 + _CUBIC * x * x))


def _gelu_slope(x: jax.Array, sigmoid: Sigmoid) -> jax.Array:
  gate = sigmoid(_GELU * x * (1 + _CUBIC * x * x))
  return gate + x * gate * (1 - gate) * _GELU * (1 + 3 * _CUBIC * x * x)


def _relu2(x: jax.Array, sigmoid: Sigmoid) -> jax.Array:
  del sigmoid
  positive = jnp.maximum(x, 0)
  return positive * positive


SOFTMAX = "softmax"
POINTWISE: dict[str, Activation] = {
  "silu": Activation(lambda x, sigmoid: x * sigmoid(x), _silu_slope),
  "gelu": Activation(_gelu, _gelu_slope),
  "relu2": Activation(_relu2, lambda x, _: 2 * jnp.maximum(x, 0)),
}
