"""Dropout with an explicit key: without one, a layer is deterministic."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Key = jax.Array | None


def fold(key: Key, index: int) -> Key:
  """The key of part `index` of a module, or None."""
  return None if key is None else jax.random.fold_in(key, index)


def dropout(x: jax.Array, rate: float, key: Key) -> jax.Array:
  """x * Bernoulli(1 - rate) / (1 - rate), element by element (Srivastava et al. 2014)."""
  return _drop(x, x.shape, rate, key)


def unit_dropout(x_BND: jax.Array, rate: float, key: Key) -> jax.Array:
  """Dropout of whole units, so that no prediction leans on one feature alone."""
  return _drop(x_BND, (*x_BND.shape[:2], 1), rate, key)


def _drop(x: jax.Array, shape: tuple[int, ...], rate: float, key: Key) -> jax.Array:
  if key is None or rate == 0:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, shape)
  return jnp.where(keep, x / (1 - rate), 0)
