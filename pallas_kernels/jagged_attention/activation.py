"""Activations of scores, in place of the softmax (generalised dot-product attention)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Activation(NamedTuple):
  """f and f', in the dtype of the score."""

  value: Callable[[jax.Array], jax.Array]
  slope: Callable[[jax.Array], jax.Array]


def _silu_slope(x: jax.Array) -> jax.Array:
  gate = jax.nn.sigmoid(x)
  return gate * (1 + x * (1 - gate))


# x (1 + tanh(u / 2)) / 2 = x sigmoid(u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3): Hendrycks 2016.
_GELU, _CUBIC = 1.5957691216057308, 0.044715


def _gelu(x: jax.Array) -> jax.Array:
  return x * jax.nn.sigmoid(_GELU * x * (1 + _CUBIC * x * x))


def _gelu_slope(x: jax.Array) -> jax.Array:
  gate = jax.nn.sigmoid(_GELU * x * (1 + _CUBIC * x * x))
  return gate + x * gate * (1 - gate) * _GELU * (1 + 3 * _CUBIC * x * x)


def _relu2(x: jax.Array) -> jax.Array:
  positive = jnp.maximum(x, 0)
  return positive * positive


SOFTMAX = "softmax"
POINTWISE: dict[str, Activation] = {
  "silu": Activation(lambda x: x * jax.nn.sigmoid(x), _silu_slope),
  "gelu": Activation(_gelu, _gelu_slope),
  "relu2": Activation(_relu2, lambda x: 2 * jnp.maximum(x, 0)),
}
